"""The state of an unfinished training: weights, moments and step, so that a crash costs few steps and changes no bit.

One folder per state, sealed like a checkpoint. It does not depend on the number of processes or on how the optimizer
is spread over them: moments are stored whole, by parameter name. Sample order and dropout follow from (seed, step), so
no generator's state is part of it.
"""

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import MANIFEST, SuperfluousFileError, build_folder, is_complete
from clmoe.utils.files import read_json, write_json
from clmoe.utils.processes import from_main, is_main
from clmoe.utils.tensors import check_finite, load_tensors, save_tensors, trainable

TENSORS = "state.safetensors"
STEP = "state.json"
OWN = "method."  # prefix of the names of what the method keeps
MOMENTS = ("exp_avg", "exp_avg_sq")


class PlainOptimizer:
    """AdamW's moments as whole tensors, one state per parameter."""

    def __init__(self, adamw: torch.optim.Optimizer) -> None:
        self.adamw = adamw

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        """A moment of the parameter's shape on the CPU; every process must call it."""
        return self.adamw.state[parameter][key].cpu()

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        self.adamw.state[parameter][key].copy_(value)

    def start_at(self, step: int) -> None:
        """Give AdamW the state of its first step, with the counter at ``step``."""
        for tensor in (tensor for group in self.adamw.param_groups for tensor in group["params"]):
            moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
            self.adamw.state[tensor] = {"step": torch.tensor(float(step)), **moments}


class ZeroOptimizer(PlainOptimizer):
    """The same under DeepSpeed's ZeRO-2, which spreads flat moments over the processes."""

    def __init__(self, adamw: torch.optim.Optimizer, zero: Any) -> None:
        super().__init__(adamw)
        self.zero = zero
        self._link()

    def read(self, parameter: nn.Parameter, key: str) -> Tensor:
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(parameter, key).reshape(parameter.shape).cpu()

    def write(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value, key)

    def start_at(self, step: int) -> None:
        super().start_at(step)
        self._link()

    def _link(self) -> None:
        """Tell every parameter where its moments are; DeepSpeed does it once, when only the first group has some."""
        if self.adamw.state:
            self.zero._hp_optimizer_states_linked = False
            self.zero._lazy_init_hp_params_optimizer_state()


def state_folder(phase: Path, step: int) -> Path:
    """Where a state lies: next to the folder that the phase is sealed in."""
    return phase.with_name(f"{phase.name}.step-{step:08}")


def states(phase: Path) -> list[Path]:
    """All sealed states of a phase, newest first."""
    folders = sorted(phase.parent.glob(f"{phase.name}.step-*"), reverse=True)
    return [folder for folder in folders if (folder / MANIFEST).is_file()]


def save_state(
    phase: Path, step: int, model: nn.Module, optimizer: PlainOptimizer, keep: int, own: dict[str, Tensor]
) -> None:
    """Write the state after ``step`` steps, then delete all but the ``keep`` newest. Called by every process.

    ``own`` is what the method keeps of its own.

    Raises ClmoeError, before anything is written, if a weight or moment is not finite.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in trainable(model).items():
        whole = {f"weight.{name}": parameter.detach().cpu()}
        whole |= {f"{key}.{name}": optimizer.read(parameter, key) for key in MOMENTS}
        if is_main():
            tensors |= {key: value.clone().contiguous() for key, value in whole.items()}
    tensors |= {f"{OWN}{name}": value.detach().cpu().clone().contiguous() for name, value in own.items()}

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
            except SuperfluousFileError:
                raise  # nothing is damaged
            except ClmoeError as error:
                warnings.warn(f"{error}; this training continues without that state", stacklevel=2)
                shutil.rmtree(folder)
        return None

    return from_main(newest)


def load_weights(folder: Path, model: nn.Module) -> int:
    """Put a state's weights into the model; returns the step. Raises ClmoeError if it trains other parameters."""
    tensors, parameters = load_tensors(folder / TENSORS), trainable(model)
    expected = {f"{kind}.{name}" for name in parameters for kind in ("weight", *MOMENTS)}
    found = {key for key in tensors if not key.startswith(OWN)}
    if found != expected:
        odd = sorted(found ^ expected)
        raise ClmoeError(f"{folder / TENSORS}: {odd[:2]} unmatched; delete {folder} and run the same command again")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weight.{name}"])
    return int(read_json(folder / STEP)["step"])


def load_own(folder: Path) -> dict[str, Tensor]:
    """What the method kept in a state, on the CPU."""
    return {k.removeprefix(OWN): v for k, v in load_tensors(folder / TENSORS).items() if k.startswith(OWN)}


def load_moments(folder: Path, model: nn.Module, optimizer: PlainOptimizer, step: int) -> None:
    """Put a state's moments into a fresh optimizer."""
    tensors = load_tensors(folder / TENSORS)
    optimizer.start_at(step)
    for name, parameter in trainable(model).items():
        for key in MOMENTS:
            optimizer.write(parameter, key, tensors[f"{key}.{name}"])
