"""Time and memory of the packed LoRA experts on one SwiGLU FFN, against the loop over experts that papers publish.

All forms add the same experts to the same frozen FFN, in one process, forward and backward (gradients of input, gate
and experts). `again` is the packed form that recomputes the FFN's product instead of keeping it, as routers per block
allow. Repeats are interleaved and medians compared, so that other load on the machine affects all forms alike. On a
CPU the times are CPU seconds of this process, on one thread; preemption does not lengthen them. A GPU is used if there
is one: the times are then those of its events, and each form's peak memory is printed. The roofline fraction is the
rate at which the adapter's own products are computed, divided by that of the frozen FFN's.

    OMP_NUM_THREADS=1 python scripts/bench/experts.py [--tokens 2048] [--rank 64] [--repeats 15] [--json]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from clock import DEVICE, device_name, timed
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import silu

from clmoe.experts.layer import Experts, loop_experts

Factors = tuple[Tensor, Tensor] | None
Project = Callable[[str, Tensor, Factors], Tensor]


@dataclass(frozen=True)
class Problem:
    """One frozen FFN with experts, and a batch of tokens: ``x [T, D]``, ``gate [T, E]``, ``upstream [T, D]``.

    ``plain`` and ``plain_16`` are peft's LoRA of the same total rank, in float32 and in the base's type.
    """

    linears: dict[str, nn.Linear]
    experts: dict[str, Experts]
    plain: nn.ModuleDict
    plain_16: nn.ModuleDict
    x: Tensor
    gate: Tensor
    upstream: Tensor

    def frozen(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        return self.linears[name](value)

    def packed(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        return self.experts[name](value, self.gate, self.linears[name])

    def again(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        return self.experts[name](value, self.gate, self.linears[name], factors)

    def loop(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        experts = self.experts[name]
        return loop_experts(value, self.gate, *experts.packed(), experts.scaling, self.frozen(name, value))

    def peft(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        return self.plain[name](value)

    def peft_16(self, name: str, value: Tensor, factors: Factors = None) -> Tensor:
        return self.plain_16[name](value)

    def forward(self, project: Project) -> Tensor:
        """``down(silu(gate(x)) * up(x))``, every projection computed by ``project``."""
        g, u = project("gate_proj", self.x, None), project("up_proj", self.x, None)
        return project("down_proj", silu(g) * u, (g, u))

    def step(self, project: Project, forward: Callable[[Project], Tensor] | None = None) -> list[Tensor]:
        """Forward and backward; the gradients of input, gate and experts (those that exist)."""
        parts = {"frozen": (), "peft": self.plain.values(), "peft_16": self.plain_16.values()}
        modules = parts.get(project.__name__, self.experts.values())
        leaves = [p for module in modules for p in module.parameters() if p.requires_grad]
        wanted = [self.x, *([self.gate] if project.__name__ not in parts else []), *leaves]
        return list(torch.autograd.grad((forward or self.forward)(project), wanted, self.upstream))


def build(tokens: int, total_rank: int, experts: int, hidden: int, ffn: int, dtype: torch.dtype) -> Problem:
    """Random weights; up-projections are not zero, so that every gradient flows. Experts and gate stay float32."""
    torch.manual_seed(0)
    shapes = {"gate_proj": (hidden, ffn), "up_proj": (hidden, ffn), "down_proj": (ffn, hidden)}
    linears = {
        name: nn.Linear(*shape, bias=False).to(DEVICE, dtype).requires_grad_(False) for name, shape in shapes.items()
    }

    def plain(kind: torch.dtype) -> nn.ModuleDict:
        lora = LoraConfig(r=total_rank, lora_alpha=2 * total_rank, target_modules=list(shapes), init_lora_weights=False)
        adapted = inject_adapter_in_model(lora, nn.ModuleDict(linears))
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.to(DEVICE, kind)
        return adapted

    mixtures: dict[str, Experts] = {}
    for name, (din, dout) in shapes.items():
        mixtures[name] = Experts(din, dout, total_rank // experts, scaling=2.0)
        mixtures[name].append(torch.randn(total_rank, din) / din**0.5, torch.randn(dout, total_rank) / dout**0.5)
        mixtures[name].to(DEVICE)
    gate = torch.randn(tokens, experts).softmax(-1).to(DEVICE).requires_grad_()
    x, upstream = (torch.randn(tokens, hidden).to(DEVICE, dtype) for _ in range(2))
    return Problem(linears, mixtures, plain(torch.float32), plain(dtype), x.requires_grad_(), gate, upstream)


def seconds(forms: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each form over ``repeats`` interleaved turns, after one turn that is not timed."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for turn in range(repeats + 1):
        for name, work in forms.items():
            spent, _ = timed(work)
            if turn:
                taken[name].append(spent)
    return {name: median(values) for name, values in taken.items()}


def peak_bytes(work: Callable[[], object]) -> int:
    """The most memory that one step takes on the GPU beyond what was there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return torch.cuda.max_memory_allocated() - before


def saved_bytes(problem: Problem, project: Project) -> int:
    """Bytes kept for the backward pass: distinct storages of saved tensors, parameters left out."""
    modules = [*problem.linears.values(), *problem.experts.values(), problem.plain, problem.plain_16]
    parameters = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = problem.forward(project)
    del output
    return sum(kept.values())


def measure(problem: Problem, repeats: int) -> dict[str, float]:
    """All figures of the report: times in milliseconds, sizes in MB (1e6 bytes)."""
    forms: dict[str, Project] = {name: getattr(problem, name) for name in ("frozen", "packed", "again", "loop")}
    steps = {name: partial(problem.step, project) for name, project in forms.items()}
    times = seconds(steps, repeats)
    kept = {name: saved_bytes(problem, project) for name, project in forms.items()}
    own = {name: times[name] - times["frozen"] for name in forms}
    extra = {name: kept[name] - kept["frozen"] for name in forms}
    pairs = zip(problem.step(problem.packed), problem.step(problem.loop), strict=True)
    hidden, ffn = problem.linears["up_proj"].in_features, problem.linears["up_proj"].out_features
    rank = problem.experts["up_proj"].packed()[0].shape[0]
    floor = 1.5 * rank * (hidden + ffn) / (hidden * ffn)  # the adapter's FLOPs over the frozen FFN's
    peaks = {f"{name}_peak_mb": peak_bytes(step) / 1e6 for name, step in steps.items()} if DEVICE.type == "cuda" else {}
    return {
        "frozen_ms": 1e3 * times["frozen"],
        "packed_adapter_ms": 1e3 * own["packed"],
        "again_adapter_ms": 1e3 * own["again"],
        "loop_adapter_ms": 1e3 * own["loop"],
        "adapter_time_loop_over_packed": own["loop"] / own["packed"],
        "adapter_time_loop_over_again": own["loop"] / own["again"],
        "packed_ffn_over_frozen": times["packed"] / times["frozen"],
        "loop_ffn_over_frozen": times["loop"] / times["frozen"],
        "flop_floor_ffn_over_frozen": 1 + floor,
        "frozen_gflop_per_s": 12e-9 * problem.x.shape[0] * hidden * ffn / times["frozen"],
        "packed_roofline_fraction": floor * times["frozen"] / own["packed"],
        "again_roofline_fraction": floor * times["frozen"] / own["again"],
        "packed_saved_mb": extra["packed"] / 1e6,
        "again_saved_mb": extra["again"] / 1e6,
        "loop_saved_mb": extra["loop"] / 1e6,
        "saved_loop_over_packed": extra["loop"] / extra["packed"],
        "saved_loop_over_again": extra["loop"] / extra["again"],
        "largest_relative_gradient_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
        **peaks,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=64, help="of all experts together")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--ffn", type=int, default=2752)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="of the base")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, args.dtype)
    problem = build(args.tokens, args.rank, args.experts, args.hidden, args.ffn, dtype)
    figures = measure(problem, args.repeats)
    if args.json:
        print(json.dumps(figures))
        return
    shape = f"E={args.experts} R={args.rank} D={args.hidden} F={args.ffn} T={args.tokens}"
    print(f"{shape} {args.dtype}, {device_name()}, {args.repeats} repeats")
    for name, value in figures.items():
        print(f"{name:38s} {value:12.4g}")


if __name__ == "__main__":
    main()
