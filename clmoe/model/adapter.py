"""The LoRA-expert adapter as a peft tuner: attach, grow, freeze, save, load.

peft finds it after ``import clmoe``, so ``get_peft_model``, ``save_pretrained`` and ``PeftModel.from_pretrained``
work as for LoRA. The mathematics lives in ``experts.py`` and ``routers.py``, which know nothing of peft.
"""

import re
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, PeftType, get_peft_model_state_dict, register_peft_method
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.activations import SiLUActivation

from clmoe.config import FFN_PROJECTIONS
from clmoe.errors import ClmoeError
from clmoe.model.experts import Experts
from clmoe.model.peft_type import PEFT_NAME, register_peft_type
from clmoe.model.projector import keep_float32, restore_float32
from clmoe.model.routers import InstanceRouter, RouterBank
from clmoe.model.routing import current_routing
from clmoe.utils.files import read_json
from clmoe.utils.names import derived_seed
from clmoe.utils.tensors import load_tensors, trainable

PROJECTOR = "multi_modal_projector"


def language_model_pattern(names: list[str]) -> str:
    """Regular expression for modules of the language model's decoder blocks; CLIP's own ``mlp`` never matches.

    ``names``: module names inside a block, such as ``gate_proj``, or ``mlp`` for whole FFNs.
    """
    return rf".*language_model\.layers\.\d+\.(mlp|self_attn|mlp\..+)?\.?({'|'.join(names)})"


def block_of(module_name: str) -> str:
    """``...language_model.layers.7.mlp`` -> ``"7"``: the block's key in the expert layout."""
    match = re.search(r"layers\.(\d+)\.", module_name)
    if match is None:
        raise ValueError(f"{module_name} is not inside a decoder block")
    return match.group(1)


register_peft_type()


@dataclass
class ExpertConfig(PeftConfig):
    """Shape of a LoRA-expert adapter; enough to rebuild it exactly, whatever has grown since it was attached.

    Attributes:
        rank: rank of **one** expert.
        scaling: the factor ``s`` of the mixture.
        dropout: one mask per linear, shared by its experts.
        projections: the linears that carry experts.
        router_scope: ``per_linear`` (each linear owns a router) or ``per_block`` (one router per FFN).
        router_top_k: experts kept per token; None keeps all.
        layout: block -> owner task of each expert, oldest first.
        router_owners: owner task of each instance router, oldest first. A router spans the experts whose owner is
            not younger than itself. Without any (``per_linear`` only) all experts are added up.
        frozen_before: experts and routers of owners below this are frozen.
        task_gates: number of rows of the task routers.
        seed: of the initial weights.
        modules_to_save: ``["multi_modal_projector"]`` when the projector is tuned.
    """

    rank: int = 8
    scaling: float = 1.0
    dropout: float = 0.0
    projections: list[str] = field(default_factory=lambda: list(FFN_PROJECTIONS))
    router_scope: str = "per_linear"
    router_top_k: int | None = None
    layout: dict[str, list[int]] = field(default_factory=dict)
    router_owners: list[int] = field(default_factory=lambda: [0])
    frozen_before: int = 0
    task_gates: int = 0
    seed: int = 0
    modules_to_save: list[str] | None = None
    target_modules: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(PEFT_NAME.upper())
        if self.router_scope not in ("per_linear", "per_block"):
            raise ValueError(f"router_scope: {self.router_scope!r} is neither 'per_linear' nor 'per_block'")
        if self.router_scope == "per_block" and not set(self.projections) <= set(FFN_PROJECTIONS):
            raise ValueError(f"projections: per_block routers serve {FFN_PROJECTIONS} only, not {self.projections}")
        names = ["mlp"] if self.router_scope == "per_block" else self.projections
        self.target_modules = language_model_pattern(names)

    @property
    def needs_routing(self) -> bool:
        """True when several tasks share the checkpoint and the task has to be chosen for each sample."""
        return len(self.router_owners) > 1 or self.task_gates > 1


class ExpertLayer(nn.Module, BaseTunerLayer):
    """A patched module: its frozen original, and per adapter the experts of its linears and their routers."""

    adapter_layer_names = ("clmoe_experts", "clmoe_routers")

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__()
        self.base_layer, self.name = base_layer, name
        self.clmoe_experts = nn.ModuleDict()
        self.clmoe_routers = nn.ModuleDict()

    @property
    def block(self) -> str:
        return block_of(self.name)

    @abstractmethod
    def linears(self, config: ExpertConfig) -> dict[str, nn.Linear]:
        """The frozen linears that carry experts, by their names in the block."""

    @property
    def experts(self) -> dict[str, Experts]:
        """The active adapter's experts, by linear."""
        return dict(self.clmoe_experts[self._only_adapter()].items())  # type: ignore[operator]

    @property
    def routers(self) -> RouterBank:
        """The active adapter's routers."""
        return self.clmoe_routers[self._only_adapter()]  # type: ignore[return-value]

    def _only_adapter(self) -> str:
        if len(self.active_adapters) != 1:
            raise ValueError(f"exactly one LoRA-expert adapter can be active, not {self.active_adapters}")
        return self.active_adapters[0]

    def attach(self, adapter: str, config: ExpertConfig) -> None:
        """Build experts and routers of the shape that ``config`` describes, with fresh weights."""
        owners = config.layout[self.block]
        frozen = sum(owner < config.frozen_before for owner in owners)
        linears = self.linears(config)
        experts = nn.ModuleDict()
        for linear_name, linear in linears.items():
            layer = Experts(linear.in_features, linear.out_features, config.rank, config.scaling, config.dropout)
            generator = seeded(config.seed, f"{self.name}.{linear_name}")
            for count, freeze in ((frozen, True), (len(owners) - frozen, False)):
                if count:
                    layer.append(*layer.fresh(count, generator))
                if freeze:
                    layer.freeze()
            experts[linear_name] = layer
        bank = RouterBank(self.name, config.router_top_k)
        din = next(iter(linears.values())).in_features
        generator = seeded(config.seed, f"{self.name}.router")
        for owner in config.router_owners:
            span = sum(expert_owner <= owner for expert_owner in owners)
            bank.append(InstanceRouter.fresh(din, span, generator), frozen=owner < config.frozen_before)
        if config.task_gates:
            bank.task.gates = torch.zeros(config.task_gates, len(owners))
        self.clmoe_experts[adapter], self.clmoe_routers[adapter] = experts, bank
        self._move_adapter_to_device_of_base_layer(adapter)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Device only: peft's own also casts to the base's dtype, and adapters stay float32 on a bfloat16 base."""
        device = device or next(self.base_layer.parameters()).device
        for container in (self.clmoe_experts, self.clmoe_routers):
            if adapter_name in container and not any(t.is_meta for t in container[adapter_name].state_dict().values()):
                container[adapter_name].to(device)


class ExpertLinear(ExpertLayer):
    """One frozen linear with experts and a router of its own (scope ``per_linear``)."""

    def linears(self, config: ExpertConfig) -> dict[str, nn.Linear]:
        return {self.name.rpartition(".")[2]: self.base_layer}  # type: ignore[dict-item]

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, din]`` -> ``[B, T, dout]``."""
        if self.disable_adapters:
            return self.base_layer(x)
        (experts,) = self.experts.values()
        return experts.around(self.base_layer, x, self.routers(x, experts.count), picked=self.routers.picked)


class ExpertMLP(ExpertLayer):
    """A frozen SwiGLU FFN whose projections share one router on the FFN's input (scope ``per_block``)."""

    def linears(self, config: ExpertConfig) -> dict[str, nn.Linear]:
        return {name: getattr(self.base_layer, name) for name in config.projections}

    def forward(self, x: Tensor) -> Tensor:
        """``x [B, T, D]`` -> ``[B, T, D]``; the gate is computed once, and the experts do not keep the product."""
        mlp = self.base_layer
        if self.disable_adapters:
            return mlp(x)
        gate, experts, picked = self.routers(x), self.experts, self.routers.picked

        def project(name: str, value: Tensor, product: tuple[Tensor, Tensor] | None = None) -> Tensor:
            linear = getattr(mlp, name)
            return experts[name].around(linear, value, gate, product, picked) if name in experts else linear(value)

        g, u = project("gate_proj", x), project("up_proj", x)
        product = (g, u) if isinstance(mlp.act_fn, SiLUActivation) else None
        return project("down_proj", mlp.act_fn(g) * u, product)  # type: ignore[operator]


class ExpertModel(BaseTuner):
    """peft's view of the adapter: puts ``ExpertLinear`` or ``ExpertMLP`` in the place of the targeted modules."""

    prefix = f"{PEFT_NAME}_"
    tuner_layer_cls = ExpertLayer

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(ExpertConfig, peft_config)
        if not isinstance(target, ExpertLayer):
            kind = ExpertMLP if config.router_scope == "per_block" else ExpertLinear
            layer = kind(target, current_key)
            layer.attach(adapter_name, config)
            for container in (layer.clmoe_experts, layer.clmoe_routers):  # 4-bit base weights take no such flag
                container.requires_grad_(adapter_name in self.active_adapters)
            self._replace_module(parent, target_name, layer, target)
        else:
            target.attach(adapter_name, config)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``clmoe_experts.default.up_proj.A -> clmoe_experts.up_proj.A``: our containers nest deeper than peft's."""
        for container in ExpertLayer.adapter_layer_names:
            key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """A plain swap, also on unload: peft's own copies a ``weight`` that an FFN does not have."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """peft enters this around every forward and generate: the place to refuse a guess of the task."""
        (name,) = self.active_adapters
        config = cast(ExpertConfig, self.peft_config[name])
        if config.needs_routing and not self.training and current_routing() is None:
            raise ClmoeError(
                "this checkpoint holds several tasks and no routing was chosen: use clmoe.load(folder).answer(image, "
                "question), which finds the task, or wrap the call in clmoe.model.routing.routing(...)"
            )
        yield


register_peft_method(name=PEFT_NAME, config_cls=ExpertConfig, model_cls=ExpertModel)


def seeded(seed: int, name: str) -> torch.Generator:
    """A generator that depends on the seed and a name only, not on the order in which modules are visited."""
    return torch.Generator().manual_seed(derived_seed(seed, name))


def expert_config(model: PeftModel) -> ExpertConfig:
    """The live configuration of the model's LoRA-expert adapter."""
    return model.peft_config[model.active_adapter]  # type: ignore[return-value]


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


def freeze_experts(model: PeftModel, before: int) -> None:
    """Freeze all experts and routers, whose owners must be tasks below ``before``; from now on they are buffers."""
    for layer in expert_layers(model).values():
        for experts in layer.experts.values():
            experts.freeze()
        layer.routers.freeze()
    expert_config(model).frozen_before = before


def grow_experts(model: PeftModel, owner: int, factors: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """Append trainable experts of task ``owner``. Rebuild the optimizer afterwards.

    ``factors``: patched module -> linear -> ``(A [n*r, din], B [dout, n*r])``; every patched module of a block must
    grow by the same number of experts.
    """
    config = expert_config(model)
    layers = expert_layers(model)
    for name, by_linear in factors.items():
        for linear, (A, B) in by_linear.items():
            layers[name].experts[linear].append(A, B)
    for block in config.layout:
        counts = {e.count for layer in layers.values() if layer.block == block for e in layer.experts.values()}
        if len(counts) != 1:
            raise ValueError(f"the linears of block {block} would have different numbers of experts: {sorted(counts)}")
        config.layout[block] += [owner] * (counts.pop() - len(config.layout[block]))


def add_routers(model: PeftModel, owner: int, weights: dict[str, Tensor]) -> None:
    """Append a trainable instance router of task ``owner`` to every bank: patched module -> ``[E, din]``."""
    for name, layer in expert_layers(model).items():
        layer.routers.append(weights[name])
    expert_config(model).router_owners.append(owner)


def add_task_gates(model: PeftModel, gates: dict[str, Tensor]) -> None:
    """Append the finished task's gate ``[E]`` to every task router: patched module -> gate."""
    for name, layer in expert_layers(model).items():
        layer.routers.task.append(gates[name])
    expert_config(model).task_gates += 1


def attach_adapter(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap ``base`` with a fresh adapter, the LoRA-expert one or any of peft's own."""
    model = get_peft_model(base, config)
    if isinstance(config, ExpertConfig) and not expert_layers(model):
        raise ClmoeError(
            f"no module of the language model matches {config.target_modules}: check the adapter's targets"
        )
    keep_float32(model)
    return model


def detach_adapter(model: PeftModel) -> None:
    """Take the adapter off; the base is then as before. peft's ``unload`` alone would leave a tuned projector in it."""
    base = adapted_llava(model)
    tuned = {name: part for name, part in base.named_modules() if isinstance(part, ModulesToSaveWrapper)}
    model.unload()
    for name, wrapper in tuned.items():
        base.set_submodule(name, wrapper.original_module)


def adapted_llava(model: PeftModel) -> LlavaForConditionalGeneration:
    """The LLaVA inside, with its projections patched."""
    return cast(LlavaForConditionalGeneration, model.base_model.model)


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Everything the adapter file holds, as on disk: trainable and frozen tensors, a tuned projector included."""
    return get_peft_model_state_dict(model, adapter_name=model.active_adapter)


def tensor_name(module: str, inner: str) -> str:
    """Name in the adapter file of a patched module's tensor: ``clmoe_experts.<linear>.A`` and the like."""
    return f"base_model.model.{module}.{inner}"


def load_adapter(base: nn.Module, folder: Path, trainable: bool) -> PeftModel:
    """Load an adapter folder onto ``base`` and prove that every tensor of the file arrived, bit for bit.

    Raises:
        ClmoeError: a file cannot be read, or a tensor is missing, superfluous, or differs after loading.
    """
    read_json(folder / "adapter_config.json")  # peft's own reader would not name a broken file
    on_disk = load_tensors(folder / "adapter_model.safetensors")
    model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable)
    restore_float32(model, on_disk)
    live = adapter_tensors(model)
    if on_disk.keys() != live.keys():
        odd = sorted(on_disk.keys() ^ live.keys())
        raise ClmoeError(
            f"{folder}/adapter_model.safetensors does not fit its adapter_config.json: {odd[:3]} unmatched"
        )
    for name, tensor in on_disk.items():
        if not torch.equal(live[name].cpu().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8)):
            raise ClmoeError(f"{folder}/adapter_model.safetensors: {name} differs after loading")
    return model


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable now, all of the adapter): the second counts frozen experts and routers, which are buffers."""
    stored = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    return sum(p.numel() for p in trainable(model).values()), stored
