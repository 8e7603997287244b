"""A mixture of LoRA experts on frozen linears: the packed product, the loop that defines it, and the peft layers."""

from __future__ import annotations  # torch before 2.13 cannot compile a function that evaluates its own annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, cat, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu
from transformers.activations import SiLUActivation

from clmoe.bases.llava import block_of
from clmoe.experts.config import ExpertConfig
from clmoe.experts.guide import Guide
from clmoe.experts.routing import InstanceRouter, RouterBank, rows_of
from clmoe.experts.separable import SeparableBank
from clmoe.utils.names import derived_seed

INIT_STD = 0.64  # A ~ N(0, (0.64 / sqrt(din))^2), 0.01 at din = 4096
RELEASED_STD = 0.01  # at every din, as in CL-MoE's released code


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends only on the seed and a name, not on the order in which modules are visited."""
    return torch.Generator().manual_seed(derived_seed(seed, name))


def packed_experts(
    x: Tensor,
    gate: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    out: Tensor,
    frozen_rank: int = 0,
    product: tuple[Tensor, Tensor] | None = None,
    frozen: Tensor | None = None,
) -> Tensor:
    """``out + scaling * sum_i gate_i * B_i A_i x`` (CL-MoE eq. 3, LLaVA-CMoE eq. 2) in two matrix products.

    The gate scales the rank-sized product ``A x``, so no expert needs a ``[..., dout]`` tensor of its own.

    Args:
        x: ``[..., din]``, the linear's input, after dropout.
        gate, A, B: ``[..., E]`` float32, ``[E*r, din]`` and ``[dout, E*r]``.
        out: ``[..., dout]``, the frozen linear's output; overwritten and returned.
        frozen_rank: the first ``frozen_rank`` ranks get no gradient.
        product: ``(g, u)`` with ``x = silu(g) * u``; the backward pass recomputes ``x`` instead of keeping it.
        frozen: ``W0 [dout, din]`` if ``out`` has no graph: the backward pass adds its part of ``x``'s gradient.
    """
    weights = (gate * scaling).to(x.dtype)
    A, B, out = A.to(x.dtype), B.to(x.dtype), out.contiguous()
    if not torch.is_grad_enabled():
        _add_experts(x, weights, A, B, out)
        return out
    return _AddExperts.apply(x, weights, A, B, out, frozen, frozen_rank, *(product or (None, None)))


def _add_experts(x: Tensor, weights: Tensor, A: Tensor, B: Tensor, out: Tensor) -> Tensor:
    """Add the gated sum to ``out`` in place; return ``A x``, ``[N, E*r]``."""
    S = rows_of(x) @ A.t()
    gated = (S.view(*rows_of(weights).shape, -1) * rows_of(weights).unsqueeze(-1)).view_as(S)
    rows_of(out).addmm_(gated, B.t())
    return S


class _AddExperts(torch.autograd.Function):
    """Keeps ``x`` or its factors, ``A x`` and the gate; torch's own graph would also keep the gated ``A x``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, A: Tensor, B: Tensor, out: Tensor,
        frozen: Tensor | None, frozen_rank: int, g: Tensor | None, u: Tensor | None,
    ) -> Tensor:  # fmt: skip
        S = _add_experts(x, weights, A, B, out)
        ctx.frozen_rank = frozen_rank
        ctx.save_for_backward(x if g is None else None, S, weights, A, B, frozen, g, u)
        ctx.mark_dirty(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs of ``forward``, in their order; None where none is needed."""
        x, S, weights, A, B, frozen, g, u = ctx.saved_tensors
        d_rows, first, gate = rows_of(d_out), ctx.frozen_rank, rows_of(weights).unsqueeze(-1)  # gate [N, E, 1]
        d_S = d_rows @ B
        d_S_by, S_by = (tensor.view(*gate.shape[:2], -1) for tensor in (d_S, S))  # [N, E, r]
        d_weights, gated = (d_S_by * S_by).sum(-1), (S_by * gate).view_as(S)
        d_S_by.mul_(gate)
        d_x = d_A = d_B = None
        if ctx.needs_input_grad[0]:
            d_x = d_S @ A if frozen is None else (d_rows @ frozen).addmm_(d_S, A)
            d_x = d_x.view(*d_out.shape[:-1], A.shape[1])
        if ctx.needs_input_grad[2]:
            d_new = d_S[:, first:].t() @ rows_of(silu(g) * u if x is None else x)
            d_A = cat([A.new_zeros(first, A.shape[1]), d_new]) if first else d_new
        if ctx.needs_input_grad[3]:
            d_new = d_rows.t() @ gated[:, first:]
            d_B = cat([B.new_zeros(B.shape[0], first), d_new], dim=1) if first else d_new
        return d_x, d_weights.view_as(weights), d_A, d_B, d_out, None, None, None, None


def loop_experts(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor) -> Tensor:
    """The same sum, one expert at a time: the definition that tests and benchmarks compare against."""
    E = gate.shape[-1]
    for g, A_i, B_i in zip(gate.split(1, -1), A.chunk(E), B.chunk(E, 1), strict=True):
        out = out + scaling * g.to(x.dtype) * (x @ A_i.to(x.dtype).t() @ B_i.to(x.dtype).t())
    return out


class Experts(nn.Module):
    """``E`` LoRA experts of rank ``r`` on one linear ``din -> dout``, in packed float32 tensors, oldest first.

    The oldest may be frozen into buffers, which peft cannot re-enable and an optimizer cannot round. The others are
    parameters. ``A [n*r, din]`` and ``B [dout, n*r]`` are None when there are none.
    """

    frozen_A: Tensor | None
    frozen_B: Tensor | None
    A: nn.Parameter | None
    B: nn.Parameter | None

    def __init__(
        self, din: int, dout: int, rank: int, scaling: float, dropout: float = 0.0, as_released: bool = False
    ) -> None:
        super().__init__()
        self.din, self.dout, self.rank, self.scaling, self.as_released = din, dout, rank, scaling, as_released
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        for factor in ("A", "B"):
            self.register_buffer(f"frozen_{factor}", None)
            self.register_parameter(factor, None)

    @property
    def count(self) -> int:
        """Number of experts, frozen ones included."""
        return sum(len(part) // self.rank for part in (self.frozen_A, self.A) if part is not None)

    def fresh(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """New experts, ``A [count*r, din]`` Gaussian and ``B [dout, count*r]`` zero, so that they change nothing."""
        std = RELEASED_STD if self.as_released else INIT_STD / self.din**0.5
        A = torch.randn(count * self.rank, self.din, generator=generator) * std
        return A, torch.zeros(self.dout, count * self.rank)

    def append(self, A: Tensor, B: Tensor) -> None:
        """Add trainable experts ``A [n*r, din]``, ``B [dout, n*r]``."""
        self.A = nn.Parameter(A if self.A is None else cat([self.A.data, A.to(self.A)]))
        self.B = nn.Parameter(B if self.B is None else cat([self.B.data, B.to(self.B)], dim=1))

    def freeze(self) -> None:
        """Freeze all experts, bit for bit."""
        if self.A is not None:
            self.frozen_A, self.frozen_B = (factor.detach().clone() for factor in self.packed())
            self.A = self.B = None

    def freeze_as(self, dtype: torch.dtype) -> None:
        """Freeze in the dtype that the forward pass computes in, which saves casts; not fit for saving afterwards."""
        self.freeze()
        self.frozen_A, self.frozen_B = (factor.to(dtype) for factor in self.packed())

    def packed(self) -> tuple[Tensor, Tensor]:
        """All experts as ``A [E*r, din]`` and ``B [dout, E*r]``."""
        if self.A is not None and self.frozen_A is not None:
            return cat([self.frozen_A, self.A]), cat([self.frozen_B, self.B], dim=1)  # type: ignore[list-item]
        return (self.frozen_A, self.frozen_B) if self.A is None else (self.A, self.B)  # type: ignore[return-value]

    def forward(self, x: Tensor, gate: Tensor, base: nn.Linear, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """``base(x)`` plus the experts' mixture, ``[..., dout]``; ``product`` as in ``packed_experts``.

        A ``gate [..., e]`` over fewer than all experts refers to the ``e`` oldest, the span of an older router.
        """
        A, B = self.packed()
        rank = gate.shape[-1] * self.rank
        if rank < len(A):
            A, B = A[:rank], B[:, :rank]
        frozen_rank = 0 if self.frozen_A is None else min(len(self.frozen_A), rank)
        takes_over = self._takes_over(base, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not takes_over):
            out = base(x)
        if base.bias is not None or (not torch.compiler.is_compiling() and out._is_view()):
            out = out.clone()  # a view, as of an 8-bit linear, which a custom function cannot change in place
        if self.as_released and self._drops:
            parts = zip(gate.split(1, -1), A.split(self.rank), B.split(self.rank, 1), strict=True)
            for number, (g, A_i, B_i) in enumerate(parts):
                first = self.rank if number * self.rank < frozen_rank else 0
                out = packed_experts(self.dropout(x), g, A_i, B_i, self.scaling, out, first)
            return out
        dropped = self.dropout(x)
        product, frozen = product if dropped is x else None, base.weight if takes_over else None
        return packed_experts(dropped, gate, A, B, self.scaling, out, frozen_rank, product, frozen)

    def _takes_over(self, base: nn.Linear, x: Tensor) -> bool:
        """False for a linear that is 4-bit, trained, sharded (ZeRO-3), has a bias, or sees another input (dropout)."""
        return (
            type(base) is nn.Linear
            and base.bias is None
            and not base.weight.requires_grad
            and not hasattr(base.weight, "ds_id")
            and base.weight.dtype == x.dtype
            and not self._drops
        )

    @property
    def _drops(self) -> bool:
        return self.training and isinstance(self.dropout, nn.Dropout)


class ExpertLayer(nn.Module, BaseTunerLayer):
    """A patched module: its frozen original and, per adapter, the experts of its linears and their routers."""

    adapter_layer_names = ("clmoe_experts", "clmoe_routers")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name, self.block = base_layer, name, block_of(name)
        self.clmoe_experts = nn.ModuleDict()
        self.clmoe_routers = nn.ModuleDict()

    def linears(self, config: ExpertConfig) -> dict[str, nn.Linear]:
        """The frozen linears that carry experts."""
        return {name: getattr(self.base_layer, name) for name in config.projections}

    def guides(self, config: ExpertConfig) -> bool:
        """Whether this is the one layer that holds the guide for all layers: the first block's first linear."""
        return self.block == "0" and self.name.endswith(f".{config.projections[0]}")

    @property
    def experts(self) -> dict[str, Experts]:
        (adapter,) = self.active_adapters
        return dict(self.clmoe_experts[adapter].items())  # type: ignore[operator]

    @property
    def routers(self) -> RouterBank:
        (adapter,) = self.active_adapters
        return self.clmoe_routers[adapter]  # type: ignore[return-value]

    def attach(self, adapter: str, config: ExpertConfig) -> None:
        """Build experts and routers of the shape that ``config`` describes, with fresh weights."""
        owners = config.layout[self.block]
        frozen = sum(owner < config.frozen_before for owner in owners)
        linears = self.linears(config)
        experts = nn.ModuleDict()
        for linear_name, linear in linears.items():
            sizes = linear.in_features, linear.out_features, config.rank
            layer = Experts(*sizes, config.scaling, config.dropout, config.as_released)
            generator = seeded(config.seed, f"{self.name}.{linear_name}")
            for count in (frozen, len(owners) - frozen):
                layer.freeze()
                if count:
                    layer.append(*layer.fresh(count, generator))
            experts[linear_name] = layer
        pick = config.pick if int(self.block) >= config.pick_from else "sum"
        linear = next(iter(linears.values()))
        generator = seeded(config.seed, f"{self.name}.router")
        bank = RouterBank(self.name, config.router_top_k, owners, pick)
        if config.instruction_width:
            dout, width = linear.out_features, config.instruction_width
            bank = SeparableBank(self.name, owners, dout, width, config.scaling, generator)
        for owner in config.router_owners:
            span = sum(expert_owner <= owner for expert_owner in owners) // bank.parts
            router = InstanceRouter.fresh(linear.in_features, span, generator)
            bank.instance.append(router)
            if owner < config.frozen_before:
                router.freeze()
        if config.guide is not None and self.guides(config):
            bank.guide = Guide(config.guide, frozen, len(owners) - frozen, generator)
        if config.task_gates:
            bank.task.gates = torch.zeros(config.task_gates, len(owners))
        self.clmoe_experts[adapter], self.clmoe_routers[adapter] = experts, bank
        self._move_adapter_to_device_of_base_layer(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Peft's own version would also cast to the base's dtype."""
        device = device or next(self.base_layer.parameters()).device
        for container in (self.clmoe_experts, self.clmoe_routers):
            if adapter_name in container and not any(t.is_meta for t in container[adapter_name].state_dict().values()):
                container[adapter_name].to(device)


class ExpertLinear(ExpertLayer):
    """A frozen linear with experts and a router of its own (scope ``per_linear``)."""

    def linears(self, config: ExpertConfig) -> dict[str, nn.Linear]:
        return {self.name.rpartition(".")[2]: self.base_layer}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, din]`` -> ``[B, T, dout]``."""
        if self.disable_adapters:
            return self.base_layer(x)
        (experts,) = self.experts.values()
        return experts(x, self.routers(x, experts), self.base_layer)


class ExpertMLP(ExpertLayer):
    """A frozen SwiGLU FFN whose projections share one router on the FFN's input (scope ``per_block``)."""

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` -> ``[B, T, D]``; the FFN's product is not kept."""
        mlp = self.base_layer
        if self.disable_adapters:
            return mlp(x)
        gate, experts = self.routers(x), self.experts

        def project(name: str, value: Tensor, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
            linear = getattr(mlp, name)
            return experts[name](value, gate, linear, product) if name in experts else linear(value)

        g, u = project("gate_proj", x), project("up_proj", x)
        product = (g, u) if isinstance(mlp.act_fn, SiLUActivation) else None
        return project("down_proj", mlp.act_fn(g) * u, product)  # type: ignore[operator]


class Float32Linear(nn.Linear):
    """Keeps its weights in float32 and computes in its input's dtype, as the experts do."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """All patched modules by name, in model order."""
    return {module.name: module for module in model.modules() if isinstance(module, ExpertLayer)}


def experts_by_linear(model: nn.Module) -> dict[str, Experts]:
    """The active adapter's experts of every linear, by the linear's full name."""
    return {
        layer.name if isinstance(layer, ExpertLinear) else f"{layer.name}.{name}": experts
        for layer in expert_layers(model).values()
        for name, experts in layer.experts.items()
    }
