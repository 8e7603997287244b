"""The hooks of a method. One method is one file here, one YAML in configs/methods, one row in the contract test."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from clmoe.config import Config, build
from clmoe.errors import ClmoeError
from clmoe.methods.context import Phase, TaskContext
from clmoe.utils.names import unknown

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import Tensor

    from clmoe.model.llava import FeatureKind, LoadedBase
    from clmoe.model.routing import RouteSelection, RouteTrace
    from clmoe.model.vae_settings import VaeSettings


@dataclass(frozen=True)
class NoOptions:
    """For methods without options of their own."""


class Method:
    """A continual-learning method; subclasses override what they need.

    Class attributes:
        chain: how ``scripts/sequence.sh`` runs it: ``sequence`` (each task continues the one before), ``separate``
            (each task starts anew), ``union`` (all tasks at once), ``none`` (nothing is trained).
        finds_task: evaluation depends on the sample's task, so ``--router`` has a meaning.
        reads_logits: ``extra_loss`` looks at ``batch["logits"]``; else they are computed in pieces, and not kept.
        reads_weights: ``extra_loss`` looks at whole weights, which ZeRO-3 spreads over the processes.
    """

    chain: ClassVar[Literal["sequence", "separate", "union", "none"]] = "sequence"
    finds_task: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    Options: ClassVar[type] = NoOptions

    def __init__(self, config: Config) -> None:
        self.config = config
        self.options: Any = build(self.Options, config.options, "options")

    def adapter(self, base: LoadedBase) -> PeftConfig:
        """The adapter of the first task."""
        raise ClmoeError(f"method {self.config.method} trains nothing")

    def effective_scale(self) -> float | None:
        """``s`` times the mean gate: the factor on an average expert's update, for tables."""
        return None

    @property
    def grows(self) -> bool:
        """Later tasks add experts; this and the next two are for ``clmoe plan``."""
        return False

    @property
    def located_on(self) -> int:
        """At most so many training records of a task have their feature computed for its locator."""
        return 0

    @property
    def task_vae(self) -> VaeSettings | None:
        """The VAE that a checkpoint holds for every task, besides the task's mean feature; None without any."""
        return None

    def phases(self, context: TaskContext) -> list[Phase]:
        """The trainings of a task, in order."""
        return [Phase("trained", context.records, context.image_root, self.begin_task, self.end_task)]

    def check_inputs(self, previous: Path | None, data: Path) -> None:
        """Files that training will read besides the task's own exist; asked before anything is loaded.

        Args:
            previous: the parent checkpoint, None where the task starts a sequence.
            data: the benchmark's folder.

        Raises:
            ClmoeError: one is missing.
        """

    def begin_task(self, context: TaskContext) -> None:
        """Before training: grow, freeze, choose what trains."""

    def extra_loss(self, model: PeftModel, trace: RouteTrace, batch: dict[str, Tensor]) -> Tensor | None:
        """A loss to add: a mean over the samples of ``batch``, weighted by their share of the global batch.

        ``batch``: what the model was given (``labels`` too, and with ``training.share_images`` the packed rows),
        ``rows [B]`` int64, its places in the phase's records, and with ``reads_logits`` ``logits [N, V]`` float32, what
        the model said, with gradient, where the answers' N tokens are predicted.
        """
        return None

    def end_task(self, context: TaskContext) -> None:
        """After training, with the trained adapter saved in ``context.trained``."""

    def feature_kind(self) -> FeatureKind:
        """The frozen base's hidden state that ``task_scores`` looks at."""
        return "last"

    def task_scores(self, checkpoint: Path, features: Tensor) -> dict[str, Tensor]:
        """How typical each decider finds the questions of each learned task: ``[M, N]``, a question's largest wins.

        The first decider's word counts; ties go to the older task. Only asked of methods with ``finds_task``.
        ``features [M, D]`` float32 on the CPU.
        """
        raise NotImplementedError

    def selection(self, model: PeftModel, tasks: Tensor) -> RouteSelection:
        """How a batch of questions that belong to ``tasks [B]`` is routed; only asked with ``finds_task``."""
        raise NotImplementedError


def method_names() -> list[str]:
    """Names of all methods: the modules of this package that hold one."""
    import clmoe.methods as package

    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if m.name not in package.SUPPORT_MODULES)


def method_class(name: str) -> type[Method]:
    """The ``METHOD`` of ``clmoe/methods/<name>.py``.

    Raises:
        ClmoeError: unknown name.
    """
    if name not in method_names():
        raise ClmoeError(unknown("method", name, method_names()))
    return importlib.import_module(f"clmoe.methods.{name}").METHOD
