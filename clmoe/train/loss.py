"""The module that is trained: the adapted LLaVA with its answer loss, all inside one forward (so DDP sees it)."""

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from clmoe.bases.llava import projector_of
from clmoe.experts.forward import adapted_base, answer_loss, answer_states, answer_tokens
from clmoe.experts.routing import NEWEST_ROUTER, RouteTrace, checkpoint_contexts, routing
from clmoe.methods.base import Method


class TrainedModel(nn.Module):
    """Answer-token cross-entropy, normalised over the global batch, plus the method's own loss.

    Logits exist at answer positions only, which is exact, and piece by piece unless the method reads them.
    """

    def __init__(self, model: PeftModel, method: Method, batch_size: int) -> None:
        super().__init__()
        self.model, self.method, self.batch_size = model, method, batch_size

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor,
        pixel_values: Tensor | None = None,
        rows: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of one micro-batch as its share of the global batch's, which has ``num_items_in_batch`` answer tokens.

        ``input_ids``, ``attention_mask`` and ``labels`` are ``[B, T]`` int64, right-padded; labels -100 outside the
        answers. ``rows [B]`` int64 are the samples' places in the phase's records.
        """
        adapted = adapted_base(self.model)
        trace = RouteTrace()
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        batch |= {} if pixel_values is None else {"pixel_values": pixel_values}
        loss: Tensor | float = 0.0
        if pixel_values is None:
            # Processes wait for each other's gradients, so a tuned projector needs one, of zero, without images too. It
            # is computed first, so that its gradient comes last, as with images: ZeRO-2 packs gradients as they come.
            tuned = (p for p in projector_of(adapted).parameters() if p.requires_grad)
            loss = 0.0 * sum(p.sum() for p in tuned)
        with routing(NEWEST_ROUTER, trace):
            states = answer_states(adapted, batch)
        if self.method.reads_logits:
            batch["logits"] = adapted.lm_head(states).float()
            answers = cross_entropy(batch["logits"], answer_tokens(labels), reduction="sum")
        else:
            answers = answer_loss(adapted.lm_head, states, answer_tokens(labels))
        loss = loss + answers / num_items_in_batch
        batch |= {} if rows is None else {"rows": rows}
        extra = self.method.extra_loss(self.model, trace, batch)
        if extra is not None:
            loss = loss + extra * (len(input_ids) / self.batch_size)
        return {"loss": loss}


def enable_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass, each block under the routing of its own forward."""
    adapted_base(model).activation_checkpointing_enable(
        activation_checkpointing_kwargs={"use_reentrant": False, "context_fn": checkpoint_contexts}
    )
