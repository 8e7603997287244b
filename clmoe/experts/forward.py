"""Forward passes of an adapted model: at the answers' tokens, on prompts, and the frozen base's features of prompts.

Notation: B records or prompts of T tokens, N answer tokens in a batch, D the hidden width, V the vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from clmoe.bases.chat import SIDE
from clmoe.bases.families import MASKED
from clmoe.bases.inputs import SharedPrompts, image_order, positions, prompt_dataset, prompt_inputs, to_device
from clmoe.bases.llava import LoadedBase, base_fingerprint, decoder_layers
from clmoe.bases.stack import CACHE, recompute_activations
from clmoe.bases.text import open_text_tower
from clmoe.config import Config, FeatureKind, View
from clmoe.data.batches import PromptItem, collate_prompts, first_questions, sample_records
from clmoe.data.images import preprocess
from clmoe.data.prompts import IGNORE
from clmoe.data.records import Question, TrainRecord
from clmoe.experts.routing import NEWEST_ROUTER, RouteSelection, checkpoint_contexts, reading, routing
from clmoe.utils.files import file_sha256, json_sha256
from clmoe.utils.paths import resolve_model_path
from clmoe.utils.processes import from_main, in_order, is_main
from clmoe.utils.tensors import load_tensors, replace_tensors

Tensors = dict[str, Tensor]
Prompts = Tensors | SharedPrompts
CHUNK = 1024  # answer tokens; their logits over LLaMA's 32,000 words take 131 MB


def adapted_base(model: PeftModel) -> PreTrainedModel:
    """The base inside, with its modules patched."""
    return cast(PreTrainedModel, model.base_model.model)


def enable_checkpointing(model: PeftModel) -> None:
    """Recompute activations in the backward pass, each block under the routing of its own forward."""
    recompute_activations(adapted_base(model), use_reentrant=False, context_fn=checkpoint_contexts)


def answered(labels: Tensor) -> Tensor:
    """``[B, T-1]`` bool: the positions that predict an answer token. N of them are true."""
    return labels[:, 1:] != IGNORE


def answer_tokens(labels: Tensor) -> Tensor:
    """The correct tokens, ``[N]`` int64, row by row."""
    return labels[:, 1:][answered(labels)]


def answer_rows(labels: Tensor) -> Tensor:
    """``[N]`` int64: the row of the batch that each answer token belongs to."""
    return answered(labels).nonzero()[:, 0]


def answer_states(model: PreTrainedModel, batch: Tensors, weights: Tensors | None = None) -> Tensor:
    """States ``[N, D]`` after the final norm that predict the answer tokens of a right-padded batch of records.

    ``weights`` replace parameters of ``model.base_model`` in this pass.
    """
    left_out = {"labels", "rows", "logits"}
    if not MASKED & batch.keys():
        # right padding needs no mask under causal attention, and without one attention uses its fastest kernel
        left_out.add("attention_mask")
    inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in left_out}
    inputs["use_cache"] = False
    body = model.base_model
    asked = batch["attention_mask"].bool() & ((batch["labels"] != IGNORE).cumsum(1) == 0)
    with reading(asked):
        output = body(**inputs) if weights is None else functional_call(body, weights, kwargs=inputs)
    return output.last_hidden_state[:, :-1][answered(batch["labels"])]


def answer_logits(model: PreTrainedModel, batch: Tensors, weights: Tensors | None = None) -> Tensor:
    """Logits ``[N, V]`` float32 for the answer tokens."""
    return model.get_output_embeddings()(answer_states(model, batch, weights)).float()


def answer_loss(head: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
    """Sum of the cross-entropies of ``tokens [N]`` at ``states [N, D]``, in float32; in recomputed pieces if many."""

    def piece(states: Tensor, tokens: Tensor) -> Tensor:
        return cross_entropy(head(states).float(), tokens, reduction="sum")

    if len(states) <= CHUNK:
        return piece(states, tokens)
    pieces = zip(states.split(CHUNK), tokens.split(CHUNK), strict=True)
    return torch.stack([checkpoint(piece, *pair, use_reentrant=False) for pair in pieces]).sum()


def mean_over_samples(values: Tensor, labels: Tensor) -> Tensor:
    """Average ``values [N]``, one per answer token, over every sample's tokens and then over the samples."""
    rows, samples = answer_rows(labels), len(labels)
    tokens = torch.bincount(rows, minlength=samples)
    return (values / tokens[rows]).sum() / samples


class _RoomyLayer(DynamicLayer):
    """One layer's keys and values, as views of buffers with room for ``room`` tokens after the first ones.

    transformers' dynamic layer copies everything for every token; with its fixed-size one, attention reads it all.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append ``[B, heads, t, d]``; returns all keys and all values so far."""
        start, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            *outer, _, width = key_states.shape
            self._buffers = [states.new_empty(*outer, end + self.room, width) for states in (key_states, value_states)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start:end, :] = states
        self.keys, self.values = (buffer[..., :end, :] for buffer in self._buffers)
        return self.keys, self.values


def empty_cache(layers: int, room: int) -> Cache:
    """A cache for a prompt, read at once, and ``room`` more tokens."""
    return Cache(layers=[_RoomyLayer(room) for _ in range(layers)])


def copied_rows(cache: Cache, rows: Tensor, room: int) -> Cache:
    """A cache that starts with ``rows [B]`` int64 of another one, for ``room`` more tokens."""
    copy = empty_cache(len(cache.layers), room)
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys[rows], layer.values[rows], index)  # type: ignore[index, union-attr]
    return copy


class Prefill(NamedTuple):
    """Prompts that have been read: ``hidden [B, D]`` is the last token's state after the final norm.

    ``attention_mask [B, T]`` int64 is the cache's; each row continues at ``next_position [B]`` int64.
    """

    hidden: Tensor
    cache: Cache
    attention_mask: Tensor
    next_position: Tensor


@torch.no_grad()
def prefill(model: PreTrainedModel, prompts: Prompts, selection: RouteSelection, room: int) -> Prefill:
    """Read left-padded prompts; ``selection`` has a row for each of them, ``room`` is for the tokens to come."""
    output, mask, last = _read(model, prompts, selection, room)
    return Prefill(output.last_hidden_state[:, -1], getattr(output, CACHE), mask, last + 1)


def _read(
    model: PreTrainedModel, prompts: Prompts, selection: RouteSelection, room: int, **wanted: Any
) -> tuple[Any, Tensor, Tensor]:
    """The model's output with its cache, the cache's mask, and the last positions ``[B]``.

    Rests follow copies of their shared prefixes.
    """
    if isinstance(prompts, SharedPrompts):
        read, *_ = _read(model, prompts.prefixes, selection.rows(prompts.first), 0)
        inputs, mask = {"input_ids": prompts.rests["input_ids"]}, prompts.attention_mask
        cache = copied_rows(getattr(read, CACHE), prompts.group, inputs["input_ids"].shape[1] + room)
    else:
        inputs, mask = prompts, prompts["attention_mask"]
        cache = empty_cache(len(decoder_layers(model)), room)
    places = positions(model, inputs, mask)[..., cache.get_seq_length() :]
    inputs = inputs | {"attention_mask": mask, "position_ids": places}
    last = places[..., -1].reshape(-1, len(mask)).amax(0)
    asked = mask[:, -inputs["input_ids"].shape[1] :].bool()
    with routing(replace(selection, asked=asked)):
        return model.base_model(**inputs, **{CACHE: cache}, use_cache=True, **wanted), mask, last


@torch.no_grad()
def base_features(model: PeftModel, batch: Prompts, kind: FeatureKind) -> Tensor:
    """The bare base's state at the last token of left-padded prompts, ``[B, D]`` float32 on the CPU.

    ``last``: after the final norm (LLaVA-CMoE section 3.3, F_end); ``pooled``: the mean over all decoder layers'
    outputs (its Table 5).
    """
    base, wanted = adapted_base(model), {"output_hidden_states": kind == "pooled"}
    with model.disable_adapter():
        if isinstance(batch, SharedPrompts):
            output, *_ = _read(base, batch, NEWEST_ROUTER, 0, **wanted)
        else:
            places = positions(base, batch, batch["attention_mask"])
            output = base.base_model(**batch, position_ids=places, use_cache=False, **wanted)
    if kind == "last":
        return output.last_hidden_state[:, -1].float().cpu()
    # the first entry is the embedding, not a layer's output
    return torch.stack([hidden[:, -1].float() for hidden in output.hidden_states[1:]]).mean(0).cpu()


@torch.no_grad()
def image_embeddings(model: PeftModel, inputs: dict[str, Tensor], images: int) -> Tensor:
    """The mean over each image's tokens from the bare base's projector, ``[I, D]`` float32 on the CPU.

    Several images only with LLaVA-1.5: the other families cut an image into parts, whose tokens are taken together.
    """
    with model.disable_adapter():
        output = cast(Any, adapted_base(model)).get_image_features(**inputs)
    parts = [tokens.float() for tokens in output.pooler_output]
    if images == 1:
        parts = [torch.cat([tokens.reshape(-1, tokens.shape[-1]) for tokens in parts])]
    return torch.stack([tokens.mean(0) for tokens in parts]).cpu()


def blank_image(base: LoadedBase) -> dict[str, Tensor]:
    """What ``get_image_features`` of this base takes, for an empty image."""
    blank = Image.new("RGB", (SIDE, SIDE))
    image = blank if base.chat is not None else preprocess(blank, base.image_processor)
    return _image_inputs(base, [base.prompt_item(Question("", "blank", "?", "", {}), image)])


def _image_inputs(base: LoadedBase, items: Sequence[PromptItem]) -> dict[str, Tensor]:
    inputs = to_device(collate_prompts(items, 0), base)
    wanted = [name for name in ("pixel_values", *base.family.inputs) if "token_type" not in name]
    return {name: inputs[name] for name in wanted}


def no_image(model: PreTrainedModel, blank: dict[str, Tensor]) -> Tensor:
    """Zero, with the graph of a pass through image encoder and projector: its gradients are zeros."""
    output = model.get_image_features(**blank)  # type: ignore[operator]
    waiting, sums = [*vars(output).values()], []  # transformers 5.0 adds attributes that ``output.values()`` lacks
    for value in waiting:  # Qwen3-VL has features for several blocks, each a tuple with one tensor per image
        if isinstance(value, list | tuple):
            waiting.extend(value)
        elif isinstance(value, Tensor) and value.requires_grad:
            sums.append(value.float().sum())
    return 0.0 * torch.stack(sums).sum()


# ---- Features that locators look at


def feature_folder(run: Path) -> Path:
    """Where a run keeps its features: ``CLMOE_FEATURES``, which runs on one base may share, or the run folder."""
    return Path(os.environ.get("CLMOE_FEATURES") or run / "features")


@dataclass(frozen=True)
class FeatureStore:
    """Features of lists of prompts, computed once: the base is frozen, so they hold for every method on it.

    A file in ``folder`` is named after everything that decides its content; without a folder, everything is recomputed.
    ``view`` says what in a sample they describe, see ``clmoe.config``. ``text_encoder`` names a CLIP text tower that
    reads texts alone, instead of the base.
    """

    base: LoadedBase
    kind: FeatureKind
    batch_size: int
    folder: Path | None
    share_images: bool = False
    view: View = "prompt"
    text_encoder: str = ""

    @classmethod
    def of(cls, base: LoadedBase, config: Config, folder: Path | None, view: View) -> FeatureStore:
        evaluation, encoder = config.evaluation, str(config.locator.options.get("text_encoder", ""))
        return cls(base, config.locator.feature, evaluation.batch_size, folder, evaluation.share_images, view, encoder)

    def features(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        """``[M, D]`` float32 on the CPU, one row per question, in order; ``[M, 2 D]`` for separate image and text.

        If the halves differ in width, the narrower one ends in zeros, which change no cosine.
        """
        if self.view == "text":
            questions = [replace(question, image=None) for question in questions]
        if self.folder is None:
            return self._compute(model, questions, image_root)
        key = from_main(lambda: self._key(questions, image_root))  # reads every image
        path = self.folder / f"{key}.safetensors"
        if from_main(path.is_file):
            return load_tensors(path)["features"]
        features = self._compute(model, questions, image_root)
        if is_main():
            replace_tensors({"features": features.contiguous()}, path)
        return features

    def _compute(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        if self.view == "image_text":
            texts = [replace(question, image=None) for question in questions]
            found = replace(self, view="text")._compute(model, texts, image_root)
            halves = [self._images(model, questions, image_root), found]
            width = max(half.shape[1] for half in halves)
            return torch.cat([pad(half, (0, width - half.shape[1])) for half in halves], dim=1)
        if self.text_encoder and self.view == "text":
            asked, tower = [question.text for question in questions], open_text_tower(self.text_encoder)
            starts = range(0, len(asked), self.batch_size)
            return torch.cat(in_order(starts, lambda start: tower(asked[start : start + self.batch_size])))
        dataset = prompt_dataset(self.base, questions, image_root)
        order = image_order([question.image if self.share_images else None for question in questions])

        def one(start: int) -> Tensor:
            items = dataset.__getitems__(order[start : start + self.batch_size])
            routes = [() if self.share_images else row for row in range(len(items))]
            return base_features(model, prompt_inputs(self.base, items, routes), self.kind)

        found = torch.cat(in_order(range(0, len(order), self.batch_size), one))
        return found[torch.tensor(order).argsort()]

    def _images(self, model: PeftModel, questions: Sequence[Question], image_root: Path) -> Tensor:
        """``[M, D]`` embeddings of the questions' images, each computed once; zeros where there is none."""
        names = list(dict.fromkeys(question.image for question in questions if question.image is not None))
        dataset = prompt_dataset(self.base, [Question("", name, "", "", {}) for name in names], image_root)
        size = self.batch_size if self.base.chat is None else 1

        def one(start: int) -> Tensor:
            items = dataset.__getitems__(range(start, min(start + size, len(names))))
            return image_embeddings(model, _image_inputs(self.base, items), len(items))

        found = in_order(range(0, len(names), size), one)
        rows = dict(zip(names, torch.cat(found), strict=True)) if names else {}
        blank = torch.zeros(self.base.model.config.get_text_config().hidden_size)
        return torch.stack([blank if question.image is None else rows[question.image] for question in questions])

    def _key(self, questions: Sequence[Question], image_root: Path) -> str:
        names = {question.image for question in questions}
        images = {name: None if name is None else file_sha256(image_root / name) for name in names}
        prompts = [(question.text, images[question.image]) for question in questions]
        base, cut = self.base, [self.batch_size, self.share_images]
        in_8bit = bool(getattr(base.model, "is_loaded_in_8bit", False))
        bits = "8bit" if in_8bit else bool(getattr(base.model, "is_loaded_in_4bit", False))
        made_by = [base.fingerprint, str(base.model.dtype), bits, base.made_by]
        kind: Any = self.kind if self.view in ("prompt", "text") else [self.view, self.kind]
        if self.text_encoder and self.view != "prompt":
            kind = [self.view, self.kind, base_fingerprint(resolve_model_path(self.text_encoder))]
        return json_sha256([made_by, kind, cut, prompts])[:32]

    def of_training(self, model: PeftModel, records: Sequence[TrainRecord], image_root: Path, config: Config) -> Tensor:
        """Features ``[M, D]`` of the first prompt of at most ``locator.samples`` training records."""
        drawn = sample_records(records, config.locator.samples, config.seed)
        return self.features(model, first_questions(drawn), image_root)
