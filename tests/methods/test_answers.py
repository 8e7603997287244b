"""The loss at the answers' tokens, taken in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy

from clmoe.methods import answers
from clmoe.methods.answers import answer_loss

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
    monkeypatch.setattr(answers, "CHUNK", chunk)
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
    monkeypatch.setattr(answers, "CHUNK", chunk)
    saved: list[torch.Size] = []
    with saved_tensors_hooks(lambda tensor: (saved.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        answer_loss(head, *case())
    assert any(shape[-1:] == (WORDS,) for shape in saved) is kept


def test_no_answers_cost_nothing(head: nn.Linear) -> None:
    states, tokens = case()
    assert answer_loss(head, states[:0], tokens[:0]).item() == 0
