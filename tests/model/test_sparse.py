"""Only the picked experts computed: the loop's values and gradients, for banks of which a token uses little."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from clmoe.model import adapter as ours
from clmoe.model import kernels, sparse
from clmoe.model.kernels import loop_experts, packed_experts
from clmoe.model.llava import LoadedBase
from clmoe.model.routers import RouterBank, gate_from_logits
from tests import support
from tests.model.adapters import SCOPES, config, randomise

SCALING, EXPERTS, RANK, TOP_K = 1.7, 64, 4, 2  # a total rank of 256, at which the sparse form starts


def case(tokens: int = 9) -> list[Tensor]:
    """x, logits, A, B, out; with 9 tokens and 2 picked, most of the 64 experts are never picked."""
    torch.manual_seed(0)
    shapes = ((1, tokens, 6), (1, tokens, EXPERTS), (EXPERTS * RANK, 6), (5, EXPERTS * RANK), (1, tokens, 5))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.fixture(autouse=True)
def _only_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products count as large ones, and what claims to be sparse cannot come from the packed form."""
    monkeypatch.setattr(sparse, "LEAST_WORK", 0)
    monkeypatch.delattr(kernels, "_AddExperts")


@pytest.mark.parametrize("tokens", [1, 9, 200])
def test_values_and_all_gradients_are_the_loops(tokens: int) -> None:
    tensors = case(tokens)
    x, logits, A, B, out = tensors
    upstream = torch.randn_like(out)
    gate = gate_from_logits(logits, TOP_K)
    got = packed_experts(x, gate, A, B, SCALING, out.clone(), picked=TOP_K)
    wanted = loop_experts(x, gate_from_logits(logits, TOP_K), A, B, SCALING, out)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    gradients = (torch.autograd.grad(answer, tensors, upstream) for answer in (got, wanted))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_experts_that_no_token_picked_get_a_gradient_of_zeros() -> None:
    x, logits, A, B, out = case()
    gate = gate_from_logits(logits, TOP_K)
    unused = ~gate[0].any(0)
    assert 40 < unused.sum() < EXPERTS
    packed_experts(x, gate, A, B, SCALING, out.clone(), picked=TOP_K).sum().backward()
    assert A.grad is not None and B.grad is not None
    assert not A.grad.view(EXPERTS, RANK, 6)[unused].any() and not B.grad.view(5, EXPERTS, RANK)[:, unused].any()
    assert A.grad.view(EXPERTS, RANK, 6)[~unused].any(-1).all()


def test_frozen_experts_get_no_gradient_and_the_others_theirs() -> None:
    tensors = case(200)
    x, logits, A, B, out = tensors
    frozen = (EXPERTS - 1) * RANK
    whole, part = (
        torch.autograd.grad(
            packed_experts(x, gate_from_logits(logits, TOP_K), A, B, SCALING, out.clone(), first, None, TOP_K).sum(),
            tensors,
        )
        for first in (0, frozen)
    )
    assert all(torch.equal(whole[index], part[index]) for index in (0, 1, 4))
    assert not part[2][:frozen].any() and not part[3][:, :frozen].any()
    assert torch.equal(part[2][frozen:], whole[2][frozen:]) and torch.equal(part[3][:, frozen:], whole[3][:, frozen:])
    assert part[2][frozen:].any()


def test_a_product_made_again_changes_no_bit() -> None:
    _, logits, A, B, out = case()
    g, u = (torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    answers = []
    for factors in (None, (g, u)):
        gate = gate_from_logits(logits, TOP_K)
        answer = packed_experts(silu(g) * u, gate, A, B, SCALING, out.clone(), product=factors, picked=TOP_K)
        answers.append(torch.autograd.grad(answer.square().sum(), (g, u, logits, A, B)))
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


def test_it_makes_the_frozen_linears_part_of_the_gradient_too() -> None:
    x, logits, A, B, _ = case(200)
    W = torch.randn(5, 6, dtype=torch.float64)
    gate = gate_from_logits(logits, TOP_K)
    got = packed_experts(x, gate, A, B, SCALING, (x @ W.t()).detach(), picked=TOP_K, frozen=W)
    wanted = loop_experts(x, gate, A, B, SCALING, x @ W.t())
    gradients = (
        torch.autograd.grad(answer.square().sum(), (x, logits, A, B), retain_graph=True) for answer in (got, wanted)
    )
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_layers_with_large_banks_take_it(scope: str, tiny_base: LoadedBase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole layers, against the packed form that stands in when the sparse one is said not to pay."""
    model = randomise(ours.attach_adapter(tiny_base.model, config(scope, EXPERTS * 2, router_top_k=TOP_K)))
    layer = next(iter(ours.expert_layers(model).values()))
    x = torch.randn(2, 5, support.SIZES.text_hidden, requires_grad=True)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
    results = []
    for pays in (True, False):
        if not pays:
            monkeypatch.undo()
            monkeypatch.setattr(kernels, "sparse_pays", lambda *_: False)
        out = layer(x)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, wanted in zip(*results, strict=True):
        assert (got - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize(
    ("tokens", "experts", "rank", "picked", "pays"),
    [
        (2048, 16, 16, 2, True),
        (2048, 8, 32, 2, True),
        (2048, 31, 8, 2, False),  # a total rank of 248
        (2048, 7, 64, 2, False),  # two of seven
        (2048, 64, 64, None, False),  # all of them
        (33, 16, 16, 2, False),  # 2.0e6 multiplications with one expert take 34 tokens
        (34, 16, 16, 2, True),
    ],
)
def test_where_it_pays(
    tokens: int, experts: int, rank: int, picked: int | None, pays: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    x, A, B = torch.empty(1, tokens, 1024), torch.empty(experts * rank, 1024), torch.empty(2752, experts * rank)
    assert sparse.sparse_pays(x, A, B, experts, picked) is pays
    assert not sparse.sparse_pays(x.to("meta"), A, B, experts, picked), "on a CPU only"


def test_a_bank_that_mixes_task_gates_promises_nothing() -> None:
    bank = RouterBank("bank", TOP_K)
    assert bank.picked == TOP_K
    bank.task.append(torch.ones(EXPERTS))
    assert bank.picked is None
