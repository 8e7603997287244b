"""The packed LoRA experts of one linear: some frozen, some trainable."""

import torch
from torch import Tensor, nn

from clmoe.model.kernels import packed_experts

INIT_STD = 0.64  # A ~ N(0, (0.64 / sqrt(din))^2), 0.01 at din = 4096 as in CL-MoE's released code


class Experts(nn.Module):
    """``E`` LoRA experts of rank ``r`` on one linear ``din -> dout``, in two packed float32 tensors.

    Experts are ordered by age. The oldest ``frozen`` ones are persistent buffers, the others parameters: a
    buffer cannot be trained, re-enabled by peft's ``set_adapter``, or rounded by an optimizer's casts.

    Attributes:
        frozen_A, A: ``[n*r, din]`` or None when that part is empty.
        frozen_B, B: ``[dout, n*r]`` or None.
    """

    frozen_A: Tensor | None
    frozen_B: Tensor | None
    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(self, din: int, dout: int, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.din, self.dout, self.rank, self.scaling = din, dout, rank, scaling
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for name in ("frozen_A", "frozen_B"):
            self.register_buffer(name, None)
        for name in ("A", "B"):
            self.register_parameter(name, None)

    @property
    def count(self) -> int:
        """Number of experts, frozen ones included."""
        return sum(0 if part is None else part.shape[0] // self.rank for part in (self.frozen_A, self.A))

    def fresh(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New experts: ``A [count*r, din]`` Gaussian, ``B [dout, count*r]`` zero, so that they change nothing."""
        A = torch.randn(count * self.rank, self.din, generator=generator) * (INIT_STD / self.din**0.5)
        return A, torch.zeros(self.dout, count * self.rank)

    def append(self, A: Tensor, B: Tensor) -> None:
        """Add trainable experts after the existing ones. ``A [n*r, din]``, ``B [dout, n*r]``."""
        self.A = nn.Parameter(A if self.A is None else torch.cat([self.A.data, A.to(self.A)]))
        self.B = nn.Parameter(B if self.B is None else torch.cat([self.B.data, B.to(self.B)], dim=1))

    def freeze(self) -> None:
        """Turn all experts into frozen ones, bit for bit."""
        if self.A is None:
            return
        A, B = self.packed()
        self.frozen_A, self.frozen_B = A.detach().clone(), B.detach().clone()
        self.A = self.B = None

    def freeze_as(self, dtype: torch.dtype) -> None:
        """As ``freeze``, in the type that the forward pass computes in: the same outputs, but no longer to be saved.

        Otherwise every pass, in generation every token, joins the frozen and the newest experts and casts them again.
        """
        self.freeze()
        assert self.frozen_A is not None and self.frozen_B is not None
        self.frozen_A, self.frozen_B = self.frozen_A.to(dtype), self.frozen_B.to(dtype)

    def packed(self, count: int | None = None) -> tuple[Tensor, Tensor]:
        """The first ``count`` (default: all) experts as ``A [count*r, din]`` and ``B [dout, count*r]``."""
        A_parts = [part for part in (self.frozen_A, self.A) if part is not None]
        B_parts = [part for part in (self.frozen_B, self.B) if part is not None]
        A = A_parts[0] if len(A_parts) == 1 else torch.cat(A_parts)
        B = B_parts[0] if len(B_parts) == 1 else torch.cat(B_parts, dim=1)
        if count is None or count == self.count:
            return A, B
        return A[: count * self.rank], B[:, : count * self.rank]

    def forward(
        self,
        x: Tensor,
        gate: Tensor,
        out: Tensor,
        product: tuple[Tensor, Tensor] | None = None,
        picked: int | None = None,
        frozen: Tensor | None = None,
    ) -> Tensor:
        """Add the experts' mixture to the frozen output. ``x [..., din]``, ``gate [..., e]``, ``out [..., dout]``.

        A gate with ``e`` smaller than the number of experts uses the ``e`` oldest: the span of an older router.
        ``out`` is used up; ``product`` (of no use under dropout), ``picked`` and ``frozen`` (not under dropout) as for
        ``packed_experts``.
        """
        A, B = self.packed(gate.shape[-1])
        frozen_rank = 0 if self.frozen_A is None else min(self.frozen_A.shape[0], A.shape[0])
        dropped = self.dropout(x)
        product = product if dropped is x else None
        return packed_experts(dropped, gate, A, B, self.scaling, out, frozen_rank, product, picked, frozen)

    def around(
        self,
        linear: nn.Module,
        x: Tensor,
        gate: Tensor,
        product: tuple[Tensor, Tensor] | None = None,
        picked: int | None = None,
    ) -> Tensor:
        """The frozen linear's output ``[..., dout]`` with the experts' mixture added; arguments as for ``forward``."""
        if self._takes_over(linear, x):
            with torch.no_grad():
                out = linear(x)
            return self(x, gate, out, product, picked, linear.weight)
        out = linear(x)
        if linear.bias is not None:
            out = out.clone()  # it is a view, which a function of its own cannot change in place
        return self(x, gate, out, product, picked)

    def _takes_over(self, linear: nn.Module, x: Tensor) -> bool:
        """Whether the experts' backward pass can make the frozen linear's part too.

        Not of a linear of another kind (4-bit) or with a bias, of a trained one, of one whose weight is elsewhere
        between the passes (ZeRO-3), or that sees another input than the experts (dropout).
        """
        return (
            type(linear) is nn.Linear
            and linear.bias is None
            and not linear.weight.requires_grad
            and not hasattr(linear.weight, "ds_id")
            and linear.weight.dtype == x.dtype
            and not (self.training and isinstance(self.dropout, nn.Dropout))
        )
