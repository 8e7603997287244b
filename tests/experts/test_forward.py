"""What a model says at the answer tokens, and prompts read into a cache, alone and with shared prefixes."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from clmoe.bases import inputs
from clmoe.bases.llava import LoadedBase
from clmoe.bases.stack import CACHE
from clmoe.data.batches import PromptItem, collate_prompts
from clmoe.data.prompts import encode_prompt
from clmoe.experts import forward
from clmoe.experts.forward import adapted_base, answer_loss, copied_rows, empty_cache
from clmoe.experts.routing import routing
from tests import support
from tests.experts.adapters import SCOPES, NewBase, attached, grow, logits, routed

TOKENS, HIDDEN, WORDS = 11, 6, 17


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 1024])
def test_pieces_give_the_whole_loss_and_its_gradient_and_keep_no_logits(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK", chunk)
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, WORDS, bias=False).requires_grad_(False)
    states, tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randint(WORDS, (TOKENS,))
    saved: list[torch.Size] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        loss = answer_loss(head, states, tokens)
    assert any(shape[-1:] == (WORDS,) for shape in saved) is (chunk >= TOKENS)
    (gradient,) = torch.autograd.grad(loss, states)
    exact = states.detach().double().requires_grad_()
    wanted = cross_entropy(exact @ head.weight.double().t(), tokens, reduction="sum")
    (expected,) = torch.autograd.grad(wanted, exact)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)
    assert answer_loss(head, states[:0], tokens[:0]).item() == 0


def test_answer_logits_are_the_models_own_at_the_answers(pristine_base: LoadedBase, answers: dict[str, Tensor]) -> None:
    labels = answers.pop("labels")
    answered = labels[:, 1:] != -100
    found = forward.answer_logits(pristine_base.model, answers | {"labels": labels})
    assert torch.equal(found, logits(pristine_base.model, answers)[:, :-1][answered])
    assert torch.equal(forward.answer_tokens(labels), labels[:, 1:][answered])
    values = torch.arange(float(len(found)))
    means = [sample.mean() for sample in values.split(answered.sum(1).tolist())]
    torch.testing.assert_close(forward.mean_over_samples(values, labels), torch.stack(means).mean())


# ---- The cache


def test_a_cache_with_room_holds_what_a_concatenating_one_holds_and_a_token_moves_nothing() -> None:
    def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
        return torch.randn(rows, 3, tokens, 4), torch.randn(rows, 3, tokens, 4)

    rows, plain, source = torch.tensor([1, 0, 1]), DynamicCache(), empty_cache(2, 0)
    for layer in range(2):
        source.update(*plain.update(*states(2, 5), layer), layer)
    before = source.layers[0].keys.clone()
    roomy = copied_rows(source, rows, 4)
    plain.batch_select_indices(rows)
    place = roomy.layers[0].keys.data_ptr()
    for tokens in (2, 1, 1):
        for layer in range(2):
            new = states(3, tokens)
            for got, wanted in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.layers[0].keys.data_ptr() == place
    assert torch.equal(source.layers[0].keys, before)


# ---- Prompts

ROUTES = (0, 0, 1, 1, 0)


def prompts(base: LoadedBase) -> tuple[list[dict[str, Tensor]], dict[str, dict[str, Tensor] | inputs.SharedPrompts]]:
    """Five prompts, four on two images, one without: each alone; all with shared prefixes; the four in one batch."""
    tokenizer, pictures = base.tokenizer, [*support.pixels(2), None]
    texts = [(0, "How many?"), (0, "How many are left?"), (1, "Which colour?"), (1, "Which?"), (2, "What is it now?")]
    items = []
    for group, text in texts:
        ids = encode_prompt(text, pictures[group] is not None, tokenizer, base.image_token_count)
        items.append(PromptItem(torch.tensor(ids), pictures[group]))
    pad = tokenizer.pad_token_id
    with patch.object(inputs, "WORTHWHILE", 2):
        shared = inputs.prompt_inputs(base, items, ROUTES)
    assert isinstance(shared, inputs.SharedPrompts) and shared.group.tolist() == [0, 0, 1, 1, 2]
    alone = [collate_prompts([item], pad) for item in items]
    return alone, {"shared": shared, "whole": collate_prompts(items[:4], pad)}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", ["shared", "whole"])
def test_prompts_read_into_a_cache_go_on_as_whole_prompts_without_one(scope: str, form: str, new_base: NewBase) -> None:
    """Oracle: each prompt alone, read again from the start for every token. The two images have different routes."""
    base = new_base()
    model = attached(base, scope)
    grow(model)
    llava, (alone, batches) = adapted_base(model), prompts(base)
    count = 5 if form == "shared" else 4
    more = torch.tensor([7, 9, 11, 13, 15])[:count]
    read = forward.prefill(llava, batches[form], routed(*ROUTES[:count]), 1)
    with torch.no_grad(), routing(routed(*ROUTES[:count])):
        mask = torch.cat([read.attention_mask, read.attention_mask.new_ones(count, 1)], 1)
        after = llava.base_model(
            input_ids=more[:, None], attention_mask=mask, position_ids=read.next_position[:, None],
            **{CACHE: read.cache}, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
    for row in range(count):
        longer = dict(alone[row], input_ids=torch.cat([alone[row]["input_ids"], more[row].view(1, 1)], 1))
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with torch.no_grad(), routing(routed(ROUTES[row])):
            states = llava.base_model(**longer, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(read.hidden[row], states[-2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[row], states[-1], rtol=1e-4, atol=1e-5)
