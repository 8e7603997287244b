"""What a model says at the answers' tokens, and prompts read into a cache, alone and with shared prefixes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from transformers import Cache, DynamicCache

from clmoe.bases.inputs import SharedPrompts
from clmoe.bases.llava import PROJECTOR, LoadedBase
from clmoe.data.batches import PromptItem, collate_prompts
from clmoe.data.prompts import encode_prompt
from clmoe.experts import forward
from clmoe.experts.forward import answer_loss, copied_rows, empty_cache
from clmoe.experts.model import adapted_base
from clmoe.experts.routing import RouteSelection, routing
from tests import support
from tests.experts.adapters import SCOPES, attached, grow

TOKENS, HIDDEN, WORDS = 11, 6, 17


@pytest.fixture
def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(HIDDEN, WORDS, bias=False, dtype=torch.float32).requires_grad_(False)


def case() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(TOKENS, HIDDEN, requires_grad=True), torch.randint(WORDS, (TOKENS,))


@pytest.mark.parametrize("chunk", [1, 4, 10, 11, 1024])
def test_pieces_give_the_whole_loss_and_its_gradient(
    head: nn.Linear, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK", chunk)
    states, tokens = case()
    loss = answer_loss(head, states, tokens)
    (gradient,) = torch.autograd.grad(loss, states)
    exact = states.detach().double().requires_grad_()
    wanted = cross_entropy(exact @ head.weight.double().t(), tokens, reduction="sum")
    (expected,) = torch.autograd.grad(wanted, exact)
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("chunk", "kept"), [(4, False), (1024, True)])
def test_logits_of_pieces_are_not_kept(
    head: nn.Linear, chunk: int, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "CHUNK", chunk)
    saved: list[torch.Size] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        answer_loss(head, *case())
    assert any(shape[-1:] == (WORDS,) for shape in saved) is kept


def test_no_answers_cost_nothing(head: nn.Linear) -> None:
    states, tokens = case()
    assert answer_loss(head, states[:0], tokens[:0]).item() == 0


# ---- The cache

LAYERS, HEADS, WIDTH = 2, 3, 4


def states(rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, HEADS, tokens, WIDTH), torch.randn(rows, HEADS, tokens, WIDTH)


def both(rows: int, tokens: int) -> tuple[DynamicCache, Cache]:
    """transformers' own and ours without room, with the same in them."""
    plain, ours = DynamicCache(), empty_cache(LAYERS, 0)
    for layer in range(LAYERS):
        new = states(rows, tokens)
        plain.update(*new, layer)
        ours.update(*new, layer)
    return plain, ours


def test_a_cache_with_room_holds_what_a_concatenating_one_holds() -> None:
    rows = torch.tensor([1, 0, 1])
    plain, first = both(2, 5)
    roomy = copied_rows(first, rows, 4)
    plain.batch_select_indices(rows)
    for tokens in (2, 1, 1):
        for layer in range(LAYERS):
            new = states(3, tokens)
            for got, wanted in zip(roomy.update(*new, layer), plain.update(*new, layer), strict=True):
                assert torch.equal(got, wanted)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1, 0) == plain.get_mask_sizes(1, 0)


def test_a_token_moves_nothing_and_the_source_stays() -> None:
    _, source = both(2, 5)
    before = source.layers[0].keys.clone()
    roomy = copied_rows(source, torch.tensor([0, 1]), 2)
    places = [roomy.update(*states(2, 1), 0)[0].data_ptr() for _ in range(2)]
    assert places[0] == places[1] == roomy.layers[0].keys.data_ptr()
    assert torch.equal(source.layers[0].keys, before)


def test_more_tokens_than_room_are_refused() -> None:
    roomy = empty_cache(1, 1)
    for tokens in (5, 1):
        roomy.update(*states(1, tokens), 0)
    with pytest.raises(ValueError, match="room for 6 tokens was given 7"):
        roomy.update(*states(1, 1), 0)


# ---- Prompts


def split(base: LoadedBase) -> tuple[list[dict[str, Tensor]], SharedPrompts]:
    """Five prompts on two images and on none: each alone, and in two parts that share what comes before."""
    tokenizer, pictures = base.tokenizer, [*support.pixels(2), None]
    prompts = [(0, "How many?"), (0, "How many are left?"), (1, "Which colour?"), (1, "Which?"), (2, "What is it now?")]
    items, rests = [], []
    for group, text in prompts:
        picture = pictures[group]
        ids = torch.tensor(encode_prompt(text, picture is not None, tokenizer, base.image_token_count))
        cut = 4 if picture is None else int((ids == tokenizer.image_token_id).nonzero()[-1]) + 1
        items.append(PromptItem(ids, picture))
        rests.append(PromptItem(ids[cut:], None))
    first = [0, 2, 4]
    cuts = [len(items[row].input_ids) - len(rests[row].input_ids) for row in first]
    prefixes = [
        PromptItem(items[row].input_ids[:cut], items[row].pixel_values) for row, cut in zip(first, cuts, strict=True)
    ]
    both = (collate_prompts(part, tokenizer.pad_token_id) for part in (prefixes, rests))
    shared = SharedPrompts(*both, torch.tensor([group for group, _ in prompts]), torch.tensor(first))
    return [collate_prompts([item], tokenizer.pad_token_id) for item in items], shared


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("form", ["shared", "whole"])
def test_prompts_read_into_a_cache_go_on_as_whole_prompts_without_one(
    scope: str, form: str, new_base: Callable[[], LoadedBase]
) -> None:
    """Oracle: each prompt alone, read again from its beginning for every token; the routes of the images differ."""
    base = new_base()
    model = attached(base, scope)
    grow(model)
    llava, (alone, shared) = adapted_base(model), split(base)
    rows = range(5) if form == "shared" else range(4)
    prompts = shared if form == "shared" else whole(base, alone[:4])
    routes = torch.tensor([0, 0, 1, 1, 0])[: len(rows)]
    more = torch.tensor([7, 9, 11, 13, 15])
    read = forward.prefill(llava, prompts, RouteSelection(router=routes), 1)
    with torch.no_grad(), routing(RouteSelection(router=routes)):
        mask = torch.cat([read.attention_mask, read.attention_mask.new_ones(len(rows), 1)], 1)
        after = llava.base_model(
            input_ids=more[: len(rows), None], attention_mask=mask, position_ids=read.next_position[:, None],
            past_key_values=read.cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
    for row in rows:
        longer = dict(alone[row], input_ids=torch.cat([alone[row]["input_ids"], more[row].view(1, 1)], 1))
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        with torch.no_grad(), routing(RouteSelection(router=routes[row : row + 1])):
            states = llava.base_model(**longer, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(read.hidden[row], states[-2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after[row], states[-1], rtol=1e-4, atol=1e-5)


def whole(base: LoadedBase, alone: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Lone prompts with an image as one left-padded batch."""
    items = [PromptItem(prompt["input_ids"][0], prompt["pixel_values"][0]) for prompt in alone]
    return collate_prompts(items, base.tokenizer.pad_token_id)


@pytest.mark.parametrize("kind", ["last", "pooled"])
def test_features_are_those_of_lone_prompts_on_the_bare_base(
    kind: forward.FeatureKind, new_base: Callable[[], LoadedBase], pristine_base: LoadedBase
) -> None:
    model = attached(new_base(), modules_to_save=[PROJECTOR])
    alone, shared = split(pristine_base)
    with torch.no_grad():
        states = [pristine_base.model.model(**prompt, output_hidden_states=True) for prompt in alone]
    blocks = [torch.stack([hidden[0, -1] for hidden in output.hidden_states[1:]]) for output in states]
    expected = [
        s.last_hidden_state[0, -1] if kind == "last" else b.mean(0) for s, b in zip(states, blocks, strict=True)
    ]
    for features, rows in (
        (forward.base_features(model, shared, kind), range(5)),
        (forward.base_features(model, whole(pristine_base, alone[:4]), kind), range(4)),
    ):
        torch.testing.assert_close(features, torch.stack([expected[row] for row in rows]), rtol=1e-4, atol=1e-5)


def test_answer_logits_are_the_models_own_at_the_answers(pristine_base: LoadedBase) -> None:
    batch = support.train_batch(pristine_base, [("How many?", "two"), ("Which side?", "on the left")])
    answers = batch["labels"][:, 1:] != -100
    with torch.no_grad():
        every = pristine_base.model(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[:, :-1]
        found = forward.answer_logits(pristine_base.model, batch)
    assert torch.equal(found, every[answers])
    assert torch.equal(forward.answer_tokens(batch["labels"]), batch["labels"][:, 1:][answers])
    values = torch.arange(float(len(found)))
    first, second = values.split(answers.sum(1).tolist())
    mean = forward.mean_over_samples(values, batch["labels"])
    torch.testing.assert_close(mean, (first.mean() + second.mean()) / 2)
