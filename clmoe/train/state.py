"""The state of an unfinished training: weights, moments and step, so that a crash costs few steps and no bit.

One folder per state, sealed like a checkpoint. It does not depend on the number of processes or on how the optimizer
is spread over them: moments are stored whole, by parameter name. Sample order and dropout follow from (seed, step), so
no generator's state belongs to it.
"""

import shutil
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import MANIFEST, build_folder, is_complete
from clmoe.utils.files import read_json, write_json
from clmoe.utils.processes import from_main, is_main, rank
from clmoe.utils.tensors import check_finite, load_tensors, save_tensors, trainable

TENSORS = "state.safetensors"
STEP = "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer(Protocol):
    """Reads and writes AdamW's moments of a parameter as whole tensors."""

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Same shape as the parameter, on the CPU, in every process."""
        ...

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None: ...

    def start_at(self, step: int) -> None:
        """As if ``step`` steps had been made; called before the moments are written."""
        ...


class PlainOptimizer:
    """torch's AdamW: one state per parameter."""

    def __init__(self, adamw: torch.optim.Optimizer) -> None:
        self.adamw = adamw

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        return self.adamw.state[parameter][key].cpu()

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self.adamw.state[parameter][key].copy_(value)

    def start_at(self, step: int) -> None:
        _fill(self.adamw, _shown(self.adamw), step)


class ZeroOptimizer:
    """DeepSpeed's ZeRO around AdamW: moments are spread over the processes, one flat tensor per group."""

    def __init__(self, adamw: torch.optim.Optimizer, zero: Any) -> None:
        self.adamw, self.zero = adamw, zero
        self._link()

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).reshape(whole_shape(parameter)).cpu()

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        if not hasattr(parameter, "ds_id"):
            safe_set_full_optimizer_state(parameter, value, key)
            return
        # ZeRO-3: this process's part; DeepSpeed's own function for whole tensors fails where the last part is padded
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        flat = torch.zeros(length)
        part = value.flatten()[rank() * length :][:length]
        flat[: len(part)] = part
        safe_set_local_optimizer_state(parameter, flat, key)

    def start_at(self, step: int) -> None:
        # ZeRO-3 shows AdamW its flat tensors only while they are stepped, one after the other
        flat = getattr(self.zero, "fp32_partitioned_groups_flat", None)
        _fill(self.adamw, _shown(self.adamw) if flat is None else flat, step)
        self._link()

    def _link(self) -> None:
        """ZeRO-2 only: tell every parameter where its moments are.

        DeepSpeed does it once, after the first group's first step, when the other groups have no moments yet.
        """
        if hasattr(self.zero, "_lazy_init_hp_params_optimizer_state") and self.adamw.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def _shown(adamw: torch.optim.Optimizer) -> list[Tensor]:
    """All tensors in its groups."""
    return [tensor for group in adamw.param_groups for tensor in group["params"]]


def _fill(adamw: torch.optim.Optimizer, tensors: Iterable[Tensor], step: int) -> None:
    """The state that AdamW would make for these tensors at its first step, with the counter set."""
    for tensor in tensors:
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        adamw.state[tensor] = {"step": torch.tensor(float(step)), **moments}


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Shape of a parameter, also where ZeRO-3 keeps only a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _weight(parameter: nn.Parameter) -> Tensor:
    """The whole parameter on the CPU, in every process."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu()
    from deepspeed.utils import safe_get_full_fp32_param

    return safe_get_full_fp32_param(parameter).reshape(whole_shape(parameter)).cpu()


def state_folder(phase: Path, step: int) -> Path:
    """Where the state after ``step`` steps of a phase lies: beside the folder that the phase is sealed in."""
    return phase.with_name(f"{phase.name}.step-{step:08}")


def states(phase: Path) -> list[Path]:
    """All sealed states of a phase, newest first."""
    folders = sorted(phase.parent.glob(f"{phase.name}.step-*"), reverse=True)
    return [folder for folder in folders if (folder / MANIFEST).is_file()]


def save_state(phase: Path, step: int, model: nn.Module, optimizer: Optimizer, keep: int) -> None:
    """Write the state after ``step`` steps, then delete all but the ``keep`` newest. Called by every process.

    Raises:
        ClmoeError: a weight or moment is not finite; nothing is written, and no older state deleted.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        whole = {f"weight.{name}": _weight(parameter)}
        whole |= {f"{key}.{name}": optimizer.read(parameter, key) for key in MOMENTS}
        if is_main():
            tensors |= {key: value.clone().contiguous() for key, value in whole.items()}

    def fill(folder: Path) -> None:
        save_tensors(tensors, folder / TENSORS)
        write_json(folder / STEP, {"step": step})

    def write() -> None:
        check_finite(tensors, f"step {step}")
        build_folder(state_folder(phase, step), fill)
        for old in states(phase)[keep:]:
            shutil.rmtree(old)

    from_main(write)


def find_state(phase: Path) -> Path | None:
    """The newest undamaged state of a phase; a damaged one is named in a warning and removed."""

    def newest() -> Path | None:
        for folder in states(phase):
            try:
                is_complete(folder)
                return folder
            except ClmoeError as error:
                warnings.warn(f"{error}; this training goes on without that state", stacklevel=2)
                shutil.rmtree(folder)
        return None

    return from_main(newest)


def load_weights(folder: Path, model: nn.Module) -> int:
    """Put a state's weights into the model, before an optimizer is made for it. Returns the step.

    Raises:
        ClmoeError: the state holds other parameters than the model trains.
    """
    tensors, parameters = load_tensors(folder / TENSORS), trainable(model)
    expected = {f"{kind}.{name}" for name in parameters for kind in ("weight", *MOMENTS)}
    if tensors.keys() != expected:
        odd = sorted(tensors.keys() ^ expected)
        raise ClmoeError(f"{folder / TENSORS}: {odd[:2]} unmatched; delete {folder} and run the same command again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    return int(read_json(folder / STEP)["step"])


def load_moments(folder: Path, model: nn.Module, optimizer: Optimizer, step: int) -> None:
    """Put a state's moments into a fresh optimizer."""
    tensors = load_tensors(folder / TENSORS)
    optimizer.start_at(step)
    for name, parameter in trainable(model).items():
        for key in MOMENTS:
            optimizer.write(parameter, key, tensors[f"{key}.{name}"])
