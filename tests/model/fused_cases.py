"""The fused kernels against the loop; ``test_fused.py`` runs this in Triton's interpreter, and on a GPU if it can."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor
from torch.nn.functional import silu

from clmoe.model import backend, fused
from clmoe.model.kernels import loop_experts, packed_experts

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
SCALING = 1.7
# tokens, din, dout, experts, rank: one token; ranks that are no power of two; several tiles of experts; one huge expert
SHAPES = [(1, 6, 5, 3, 4), (37, 70, 50, 5, 3), (70, 33, 40, 8, 64), (17, 40, 30, 2, 200), (20, 20, 70, 26, 8)]
NEAR = {torch.float32: 1e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def case(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """x, gate, A, B, out as ``packed_experts`` takes them: 16-bit activations, float32 gate and experts."""
    torch.manual_seed(0)
    tokens, din, dout, experts, rank = shape
    x, gate = torch.randn(tokens, din).to(dtype), torch.randn(tokens, experts).softmax(-1)
    A, B = torch.randn(experts * rank, din) / din**0.5, torch.randn(dout, experts * rank) / rank**0.5
    tensors = (x, gate, A, B, torch.randn(tokens, dout).to(dtype))
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def near(ours: Tensor, exact: Tensor, tolerance: float) -> None:
    assert (ours.double() - exact).norm() <= tolerance * exact.norm()


@pytest.fixture(autouse=True)
def _calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(backend.VARIABLE, "triton")


@pytest.mark.parametrize("dtype", NEAR)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_equals_the_loop_in_float64_with_all_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    assert backend.uses_fused(DEVICE, dtype, shape[-1])
    tensors = case(shape, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    upstream = torch.randn(shape[0], shape[2], device=DEVICE).to(dtype)
    x, gate, A, B, out = tensors
    answer = packed_experts(x, gate, A, B, SCALING, out.clone())
    wanted = loop_experts(*exact[:4], SCALING, exact[4])
    near(answer, wanted, NEAR[dtype])
    gradients = zip(
        torch.autograd.grad(answer, tensors, upstream), torch.autograd.grad(wanted, exact, upstream.double()),
        strict=True,
    )  # fmt: skip
    for ours, theirs in gradients:
        near(ours, theirs, NEAR[dtype])


def test_the_gates_gradient_is_summed_in_float32() -> None:
    """512 products of one sign, which bfloat16 sums would stop adding up at 256."""
    ones = torch.ones(16, 512, dtype=torch.bfloat16, device=DEVICE)
    eye = torch.ones(1, 512, dtype=torch.bfloat16, device=DEVICE)
    d_weights = fused.gated_gradients(ones[:, :1], eye, ones, ones[:, :1])[2]
    assert torch.equal(d_weights, torch.full_like(d_weights, 512))


def test_strided_inputs_spans_of_a_bank_and_batches() -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case((6, 20, 30, 4, 3), torch.float32))
    for view in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, :20]):
        older = packed_experts(view, gate[:, :2], A[:6], B[:, :6], SCALING, out.clone())
        near(older, loop_experts(x.double(), gate[:, :2], A[:6], B[:, :6], SCALING, out.double()), 1e-6)
    batched = packed_experts(x.view(2, 3, 20), gate.view(2, 3, 4), A, B, SCALING, out.clone().view(2, 3, 30))
    assert torch.equal(batched.view(6, 30), packed_experts(x, gate, A, B, SCALING, out.clone()))


def test_frozen_experts_and_a_product_made_again() -> None:
    _, gate, A, B, out = case((9, 20, 30, 4, 3), torch.float32)
    g, u = (torch.randn(9, 20, device=DEVICE, requires_grad=True) for _ in range(2))
    answers = []
    for frozen, factors in ((0, None), (6, None), (6, (g, u))):
        answer = packed_experts(silu(g) * u, gate, A, B, SCALING, out.clone(), frozen, factors)
        answers.append(torch.autograd.grad(answer.square().sum(), (g, u, gate, A, B)))
    assert all(torch.equal(*pair) for pair in zip(*answers[1:], strict=True))
    assert not answers[1][3][:6].any() and not answers[1][4][:, :6].any()
    torch.testing.assert_close(answers[1][3][6:], answers[0][3][6:])
    torch.testing.assert_close(answers[1][4][:, 6:], answers[0][4][:, 6:])


def test_no_tokens() -> None:
    x, gate, A, B, out = case((0, 20, 30, 4, 3), torch.float32)
    answer = packed_experts(x, gate, A, B, SCALING, out.clone())
    assert answer.shape == (0, 30)
    assert not any(gradient.any() for gradient in torch.autograd.grad(answer.sum(), (A, B)))


def test_a_compiled_layer_keeps_the_kernels_as_operators() -> None:
    tensors = case((9, 20, 30, 4, 3), torch.float32)

    def layer(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
        return packed_experts(x, gate, A, B, SCALING, out * 1.0, 3)

    answers = []
    for form in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        answer = form(*tensors)
        answers.append([answer, *torch.autograd.grad(answer.square().sum(), tensors)])
    assert all(torch.equal(*pair) for pair in zip(*answers, strict=True))


@pytest.mark.parametrize("operator", ["gated_product", "gated_gradients"])
def test_operators_are_registered_as_they_behave(operator: str) -> None:
    x, gate, A, B, out = (tensor.detach() for tensor in case((9, 20, 30, 4, 3), torch.float32))
    arguments = (x, A, gate) if operator == "gated_product" else (out, B, x @ A.t(), gate)
    torch.library.opcheck(getattr(fused, operator), arguments)


def test_a_kernel_that_fails_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __getitem__(self, grid: tuple[int, ...]) -> None:
            raise RuntimeError("out of resource:\n shared memory")

    monkeypatch.setattr(fused, "_forward", Broken())
    x, gate, A, B, out = case((9, 20, 30, 4, 3), torch.float32)
    with pytest.raises(fused.ClmoeError, match=r"RuntimeError: out of resource: shared memory.*CLMOE_KERNELS=torch"):
        packed_experts(x, gate, A, B, SCALING, out.clone())
