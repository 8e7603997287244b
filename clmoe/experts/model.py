"""The LoRA-expert adapter as a peft tuner: attach, grow, freeze, save, load. It is float32 on a base of any dtype."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, register_peft_method
from torch import Tensor, nn
from transformers import PreTrainedModel

from clmoe.bases.llava import decoder_layers
from clmoe.bases.stack import NAMES_ADAPTERS
from clmoe.errors import ClmoeError
from clmoe.experts.config import PEFT_NAME, ExpertConfig
from clmoe.experts.forward import adapted_base
from clmoe.experts.guide import Guide
from clmoe.experts.layer import ExpertLayer, ExpertLinear, ExpertMLP, Float32Linear, expert_layers
from clmoe.experts.prompts import SoftPrompts
from clmoe.experts.routing import NEWEST_ROUTER, SHARES, InstanceRouter, current_routing
from clmoe.utils.files import read_json
from clmoe.utils.tensors import load_tensors, same_bits, trainable

IN_FILES = "base_model.model."
"""What peft puts before the name of each module in an adapter file."""


class ExpertModel(BaseTuner):
    """peft's view of the adapter: it replaces the targets with ``ExpertLinear``, ``ExpertMLP`` or ``SoftPrompts``."""

    prefix = f"{PEFT_NAME}_"
    tuner_layer_cls = (ExpertLayer, SoftPrompts)  # type: ignore[assignment]  # it goes to isinstance

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not NAMES_ADAPTERS:
            self.register_state_dict_post_hook(_named_as_in_files)
        self.hooks = []
        if (guide := find_guide(self)) is not None:
            first = decoder_layers(cast(PreTrainedModel, self.model))[0]
            self.hooks.append(first.register_forward_pre_hook(partial(_guided, guide), with_kwargs=True))

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        config, adapter, target, name, parent = args
        if isinstance(target, self.tuner_layer_cls):
            target.attach(adapter, config)
            return
        expert = ExpertMLP if config.router_scope == "per_block" else ExpertLinear
        layer = (SoftPrompts if isinstance(target, nn.Embedding) else expert)(target, kwargs["current_key"])
        layer.attach(adapter, config)
        for container in layer.adapter_layer_names:  # 4-bit base weights take no such flag
            getattr(layer, container).requires_grad_(adapter in self.active_adapters)
        setattr(parent, name, layer)

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        """``clmoe_experts.default.up_proj.A -> clmoe_experts.up_proj.A``: our containers nest deeper than peft's."""
        return super()._remove_adapter_name_from_key(_name_in_file(key, adapter_name), adapter_name)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """A plain swap on unload: peft's own copies a ``weight``, which an FFN does not have."""
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse to guess the task; peft enters this around every forward and generate."""
        config = cast(ExpertConfig, self.peft_config[self.active_adapters[0]])
        if config.needs_routing and not self.training and current_routing() is None:
            raise ClmoeError(
                "this checkpoint holds several tasks and no routing was chosen: use clmoe.load(folder).answer(image, "
                "question), which finds the task, or wrap the call in clmoe.routing(...)"
            )
        yield


def find_guide(model: nn.Module) -> Guide | None:
    """The module that weights the tasks for all layers; None for methods without one."""
    found = [module for module in model.modules() if isinstance(module, Guide)]
    return found[0] if found else None


def _guided(guide: Guide, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before the first decoder block, whose input is the embeddings: weight the tasks of each sample by its prompt."""
    selection, _ = current_routing() or (NEWEST_ROUTER, None)
    if selection.asked is not None and selection.kept is not None:
        selection.kept[SHARES] = guide(args[0] if args else kwargs["hidden_states"], selection.asked)


def _name_in_file(key: str, adapter_name: str) -> str:
    for container in (*ExpertLayer.adapter_layer_names, *SoftPrompts.adapter_layer_names):
        key = key.replace(f".{container}.{adapter_name}.", f".{container}.")
    return key


def _named_as_in_files(model: ExpertModel, tensors: dict[str, Tensor], *unused: Any) -> None:
    """Name the active adapter's tensors in a state dict as in its file: an older peft saves what it finds there."""
    renamed = {_name_in_file(key, model.active_adapters[0]): tensor for key, tensor in tensors.items()}
    tensors.clear()
    tensors.update(renamed)


register_peft_method(name=PEFT_NAME, config_cls=ExpertConfig, model_cls=ExpertModel)


def attach_adapter(base: nn.Module, config: PeftConfig) -> PeftModel:
    """Wrap ``base`` with a fresh adapter, ours or one of peft's. Raises ClmoeError if no module matches its targets."""
    targets = config.to_dict()["target_modules"]
    if not any(re.fullmatch(targets, name) for name, _ in base.named_modules()):
        raise ClmoeError(f"no module of the base matches {targets}: check adapter.targets")
    model = get_peft_model(base, config)
    _keep_float32(model)
    return model


def detach_adapter(model: PeftModel) -> None:
    """Restore the base as it was. peft's ``unload`` alone would leave a tuned projector in it."""
    base = adapted_base(model)
    for name, part in list(base.named_modules()):
        if isinstance(part, ModulesToSaveWrapper):
            base.set_submodule(name, part.original_module)
    for hook in getattr(model.base_model, "hooks", []):
        hook.remove()
    model.unload()


def load_adapter(base: nn.Module, folder: Path, trainable: bool) -> PeftModel:
    """Load an adapter folder onto ``base``. Raises ClmoeError unless its tensors, and no others, arrive bit for bit."""
    read_json(folder / "adapter_config.json")  # peft's own reader would not name a broken file
    file = folder / "adapter_model.safetensors"
    saved = load_tensors(file)
    for name, tensor in saved.items():
        if not name.startswith(IN_FILES):
            raise ClmoeError(f"{file} does not fit its adapter_config.json: {name} does not begin with {IN_FILES}")
        if tensor.dtype in (torch.float16, torch.bfloat16):
            raise ClmoeError(f"{file}: {name} is {tensor.dtype}, adapters are float32: save it with .float() tensors")
    try:
        # peft itself would read the file onto the first GPU in every process
        where = str(next(base.parameters()).device)
        model = PeftModel.from_pretrained(base, str(folder), is_trainable=trainable, torch_device=where)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()] or [repr(error)]
        reason = next((line for line in lines if line.startswith("size mismatch")), lines[0])
        raise ClmoeError(f"{file} does not fit its adapter_config.json, or this base: {reason}") from error
    _keep_float32(model, saved)
    live = adapter_tensors(model)
    if odd := sorted(saved.keys() ^ live.keys()):
        raise ClmoeError(f"{file} does not fit its adapter_config.json: {odd[:3]} unmatched")
    for name, tensor in saved.items():
        if not same_bits(live[name], tensor):
            raise ClmoeError(f"{file}: {name} differs after loading")
    return model


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """Everything in the adapter file, under its names there: trainable and frozen tensors, and a tuned projector."""
    return get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)


def tensor_name(module: str, inner: str) -> str:
    """The adapter file's name for a patched module's tensor; ``inner`` is, say, ``clmoe_experts.up_proj.A``."""
    return f"{IN_FILES}{module}.{inner}"


@torch.no_grad()
def _keep_float32(model: PeftModel, saved: dict[str, Tensor] | None = None) -> None:
    """Make the adapter's copy of the projector float32, with the values of ``saved``: peft's has the base's dtype."""
    for path, wrapper in model.named_modules():
        if isinstance(wrapper, ModulesToSaveWrapper):
            for part in wrapper.modules_to_save.values():
                for module in part.modules():
                    if type(module) is nn.Linear:
                        module.float().__class__ = Float32Linear
                if (dtypes := {p.dtype for p in part.parameters()}) - {torch.float32}:  # norms, or bare matrices
                    (dtype,) = dtypes - {torch.float32}
                    part.float().register_forward_pre_hook(_to_float32)
                    part.register_forward_hook(partial(_from_float32, dtype=dtype))
                if saved is not None:
                    for name, parameter in part.named_parameters():
                        parameter.copy_(saved[f"{path}.{name}"])


def _to_float32(part: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)


def _from_float32(part: nn.Module, inputs: tuple[Any, ...], output: Tensor, dtype: torch.dtype) -> Tensor:
    return output.to(dtype)


def expert_config(model: PeftModel) -> ExpertConfig:
    return model.peft_config[model.active_adapter]  # type: ignore[return-value]


def count_parameters(model: PeftModel) -> tuple[int, int]:
    """(trainable now, all of the adapter): the second includes frozen experts and routers, which are buffers."""
    stored = sum(tensor.numel() for tensor in adapter_tensors(model).values())
    return sum(p.numel() for p in trainable(model).values()), stored


def freeze_experts(model: PeftModel, before: int) -> None:
    """Turn all experts and routers into buffers; their owners must be tasks below ``before``."""
    for layer in expert_layers(model).values():
        for experts in layer.experts.values():
            experts.freeze()
        for router in layer.routers.instance:
            cast(InstanceRouter, router).freeze()
    expert_config(model).frozen_before = before


def grow_experts(model: PeftModel, owner: int, factors: dict[str, dict[str, tuple[Tensor, Tensor]]]) -> None:
    """Append trainable experts of task ``owner``: patched module -> linear -> ``(A [n*r, din], B [dout, n*r])``."""
    config, layers = expert_config(model), expert_layers(model)
    for name, by_linear in factors.items():
        for projection, (A, B) in by_linear.items():
            layers[name].experts[projection].append(A, B)
    for block, owners in config.layout.items():
        count = max(e.count for layer in layers.values() if layer.block == block for e in layer.experts.values())
        owners += [owner] * (count - len(owners))
    for layer in layers.values():
        layer.routers.owners = list(config.layout[layer.block])


def add_routers(model: PeftModel, owner: int, weights: dict[str, Tensor]) -> None:
    """Append a trainable instance router of task ``owner`` to every bank: patched module -> ``[E, din]``."""
    for name, layer in expert_layers(model).items():
        layer.routers.instance.append(InstanceRouter(weights[name]))
    expert_config(model).router_owners.append(owner)


def add_task_gates(model: PeftModel, gates: dict[str, Tensor]) -> None:
    """Append the finished task's gate ``[E]`` to every task router: patched module -> gate."""
    for name, layer in expert_layers(model).items():
        layer.routers.task.append(gates[name])
    expert_config(model).task_gates += 1
