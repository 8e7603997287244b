"""What a method would train on a model, counted on the meta device: real modules, no weights, nothing downloaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from clmoe.config import Config, ModelConfig
from clmoe.errors import ClmoeError
from clmoe.methods.attached import TrainingShapes, base_tensors, llava_shapes, locator_bytes, training_shapes
from clmoe.methods.base import Method
from clmoe.utils.files import read_json
from clmoe.utils.paths import known_configs, repository_root, resolve_model_path
from clmoe.utils.tensors import trainable

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import LlavaForConditionalGeneration

    from clmoe.experts.layer import ExpertLayer

SHAPES = "config.json"


@dataclass(frozen=True)
class PlannedLinear:
    """One kind of adapted linear ``din -> dout``, the same in ``blocks`` decoder blocks. Plain LoRA is one expert.

    Attributes:
        rank: of one expert.
        scale: ``s``, the factor on the experts' mixture (of LoRA: on its update).
    """

    name: str
    din: int
    dout: int
    experts: int
    rank: int
    scale: float
    blocks: int = 1

    @property
    def total_rank(self) -> int:
        return self.experts * self.rank

    @property
    def parameters(self) -> int:
        """``A [E*r, din]`` and ``B [dout, E*r]`` in every block."""
        return self.blocks * self.total_rank * (self.din + self.dout)

    def as_json(self) -> dict[str, Any]:
        """All fields and what follows from them."""
        names = ("name", "din", "dout", "blocks", "experts", "rank", "total_rank", "scale", "parameters")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Growth:
    """What a later task adds and trains; everything older is frozen.

    A task's own router in every block is a copy of the newest one, ``[E, din]``, with one more row for each expert
    that the task adds to the block.

    Attributes:
        blocks: decoder blocks that carry experts.
        one_expert: parameters of one expert in one block, over all its adapted linears.
        router: parameters of one block's router before any growth.
        router_row: what one more expert adds to them.
        extended_blocks: blocks that one later task extends by one expert, on average; None when not asked for.
    """

    blocks: int
    one_expert: int
    router: int
    router_row: int
    extended_blocks: float | None

    def as_json(self) -> dict[str, Any]:
        """The last three are of one later task, the routers of the first that grows; None without the number X."""
        X = self.extended_blocks
        return {
            "expert_parameters_per_block": self.one_expert,
            "router_parameters_per_block": self.router,
            "extended_blocks": X,
            "expert_parameters_per_task": None if X is None else round(X * self.one_expert),
            "router_parameters_first_growth": None if X is None else round(self.blocks * self.router + self._rows(X)),
            "router_parameters_more_each_task": None if X is None else round(self._rows(X)),
        }

    def _rows(self, extended: float) -> float:
        return extended * self.router_row


@dataclass(frozen=True)
class Plan:
    """The figures of ``clmoe plan``; parameters are those that train when the first task starts.

    Attributes:
        shapes: the config.json that the model's shapes come from, None when nothing is attached.
        base: parameters of the frozen base.
        effective_scale: ``s`` times the mean gate.
        growth: None for methods that add nothing to later tasks.
        steps: optimizer steps per task, None when the number of records decides.
        training: what decides memory and disk; None when nothing is trained.
        locator: bytes that each task adds to what finds a question's task.
    """

    method: str
    model: str
    shapes: str | None
    base: int
    linears: list[PlannedLinear]
    experts: int
    routers: int
    projector: int
    trainable: int
    effective_scale: float | None
    growth: Growth | None
    steps: int | None
    training: TrainingShapes | None
    locator: int

    def as_json(self) -> dict[str, Any]:
        """What ``clmoe plan --json`` prints."""
        return {
            "method": self.method,
            "model": self.model,
            "shapes": self.shapes,
            "base_parameters": self.base,
            "linears": [linear.as_json() for linear in self.linears],
            "expert_parameters": self.experts,
            "router_parameters": self.routers,
            "projector_parameters": self.projector,
            "trainable_parameters": self.trainable,
            "effective_scale": self.effective_scale,
            "growth": None if self.growth is None else self.growth.as_json(),
            "steps_per_task": self.steps,
        }


def make_plan(method: Method, extended_blocks: float | None = None) -> Plan:
    """Attach the method's adapter to a meta model of the configured shapes and count.

    Args:
        extended_blocks: blocks that a later task extends by one expert, on average; only for methods that grow.

    Raises:
        ClmoeError: shapes that cannot be found or read, or ``extended_blocks`` where it has no meaning.
    """
    config = method.config
    if extended_blocks is not None and not method.grows:
        raise ClmoeError(f"--extended-blocks: {config.name} adds no experts to later tasks; leave it out")
    if method.chain == "none":
        return _nothing(config)
    import torch

    from clmoe.experts.model import count_parameters

    file = shapes_file(config.model)
    dtype = getattr(torch, config.model.dtype)
    base = meta_llava(file).to(dtype)
    held = base_tensors(base, quantised=config.model.load_in_4bit)
    shapes = llava_shapes(base)
    size = sum(parameter.numel() for parameter in base.parameters())
    model = adapted_meta(method, base)
    return Plan(
        config.name,
        config.model.path,
        str(file),
        size,
        _grouped(_linears(model)),
        _trainable(model, "clmoe_experts.", "lora_"),
        _trainable(model, "clmoe_routers."),
        _trainable(model, "modules_to_save."),
        count_parameters(model)[0],
        method.effective_scale(),
        _growth(model, extended_blocks) if method.grows else None,
        config.training.steps,
        training_shapes(model, method, held, shapes, dtype.itemsize),
        locator_bytes(method, shapes.hidden),
    )


def _nothing(config: Config) -> Plan:
    return Plan(config.name, config.model.path, None, 0, [], 0, 0, 0, 0, None, None, None, None, 0)


def shapes_file(config: ModelConfig) -> Path:
    """The model folder's config.json, or the one that ``architecture`` names where the folder is not at hand.

    Raises:
        ClmoeError: neither exists.
    """
    try:
        folder = Path(resolve_model_path(config.path))
    except ClmoeError:
        if not config.architecture:
            raise
    else:
        if folder.is_dir():
            return folder / SHAPES
    if not config.architecture:
        raise ClmoeError(
            f"model {config.path} is not a folder here, and plan downloads nothing: give --model a folder or a name in "
            f"configs/models ({', '.join(known_configs('models'))}), or set model.architecture to its config.json"
        )
    for candidate in (Path(config.architecture).expanduser(), repository_root() / config.architecture):
        if candidate.is_file():
            return candidate
    raise ClmoeError(f"model.architecture {config.architecture}: no such file")


def meta_llava(file: Path) -> LlavaForConditionalGeneration:
    """A frozen LLaVA of the shapes in a transformers config.json, without weights.

    Raises:
        ClmoeError: the file is not the configuration of a LLaVA.
    """
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llava":
        raise ClmoeError(f"{file}: field 'model_type': expected 'llava', found {kind!r}")
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig.from_dict(values))
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ClmoeError(f"{file}: not a LLaVA that transformers can build: {' '.join(str(error).split())}") from error
    return model.requires_grad_(False)


def adapted_meta(method: Method, base: LlavaForConditionalGeneration) -> PeftModel:
    """A meta model with the adapter of the method's first task."""
    import torch

    from clmoe.bases.llava import LoadedBase, count_image_tokens
    from clmoe.experts.model import attach_adapter

    # a method's ``adapter`` reads shapes only; there is no tokenizer to give it
    loaded = LoadedBase(base, cast(Any, None), cast(Any, None), count_image_tokens(base), fingerprint="")
    with torch.device("meta"):
        return attach_adapter(base, method.adapter(loaded))


def _linears(model: PeftModel) -> Iterator[PlannedLinear]:
    """Every adapted linear, in model order."""
    from peft.tuners.lora import LoraLayer

    from clmoe.experts.model import experts_by_linear

    for name, experts in experts_by_linear(model).items():
        yield PlannedLinear(_last(name), experts.din, experts.dout, experts.count, experts.rank, experts.scaling)
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            key, linear = model.active_adapter, cast("nn.Linear", layer.get_base_layer())
            din, dout = linear.in_features, linear.out_features
            yield PlannedLinear(_last(name), din, dout, 1, layer.r[key], layer.scaling[key])


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _grouped(linears: Iterator[PlannedLinear]) -> list[PlannedLinear]:
    """Equal linears of different blocks as one entry."""
    return [replace(linear, blocks=count) for linear, count in Counter(linears).items()]


def _trainable(model: PeftModel, *marks: str) -> int:
    """Parameters that train and have one of ``marks`` in their name."""
    return sum(p.numel() for name, p in trainable(model).items() if any(mark in name for mark in marks))


def _growth(model: PeftModel, extended_blocks: float | None) -> Growth:
    """All blocks start alike, so one stands for all; growing needs one router per block, so it is one module."""
    from clmoe.experts.model import expert_layers

    layers: list[ExpertLayer] = list(expert_layers(model).values())
    if extended_blocks is not None and not 0 <= extended_blocks <= len(layers):
        raise ClmoeError(f"--extended-blocks {extended_blocks:g}: the model has {len(layers)} blocks")
    experts = list(layers[0].experts.values())
    (router,) = layers[0].routers.instance
    weight = router.weight
    one_expert = sum(e.rank * (e.din + e.dout) for e in experts)
    return Growth(len(layers), one_expert, weight.numel(), weight.shape[1], extended_blocks)  # type: ignore[operator, index, arg-type]


def plan_text(plan: Plan) -> str:
    """The plan for a human: millions of parameters, and the exact number where it is one."""
    if plan.shapes is None:
        return f"{plan.method} trains nothing"
    lines = [
        f"{plan.method} on {plan.model} ({_millions(plan.base)} parameters, frozen)",
        f"shapes: {plan.shapes}",
        "",
        f"{'linear':<11}{'in':>7}{'out':>7}{'blocks':>8}{'experts':>9}{'rank each':>11}{'rank total':>12}"
        f"{'scale':>8}{'parameters':>14}",
        *(
            f"{x.name:<11}{x.din:>7}{x.dout:>7}{x.blocks:>8}{x.experts:>9}{x.rank:>11}{x.total_rank:>12}"
            f"{x.scale:>8g}{_millions(x.parameters):>14}"
            for x in plan.linears
        ),
        "",
        "trainable at the start of the first task",
        *_rows(
            {"experts": plan.experts, "routers": plan.routers, "projector": plan.projector, "total": plan.trainable}
        ),
        *([] if plan.growth is None else _growth_text(plan.growth)),
        "",
        f"effective scale (scale times mean gate): {plan.effective_scale:g}",
    ]
    return "\n".join(lines)


def _growth_text(growth: Growth) -> list[str]:
    """What later tasks train, for a human."""
    values = growth.as_json()
    lines = ["", "growth, of one block"]
    lines += _rows(
        {
            "one expert": values["expert_parameters_per_block"],
            f"router at the start, {growth.router_row} more for each expert": values["router_parameters_per_block"],
        }
    )
    if growth.extended_blocks is None:
        return [*lines, "  (--extended-blocks X tells what a later task trains)"]
    lines += ["", f"trainable in a later task that extends {growth.extended_blocks:g} of {growth.blocks} blocks by one"]
    return lines + _rows(
        {
            "experts": values["expert_parameters_per_task"],
            "routers of the first such task": values["router_parameters_first_growth"],
            "more router parameters in each later one": values["router_parameters_more_each_task"],
        }
    )


def _rows(values: dict[str, int]) -> list[str]:
    return [f"  {name:<48}{_millions(number):>12}{number:>16,}" for name, number in values.items()]


def _millions(number: int) -> str:
    return f"{number / 1e6:.2f} M"
