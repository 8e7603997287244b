"""What every method promises its users: ``clmoe check-method`` tries it on the embedded base; tests share the checks.

A check raises ``BrokenPromise`` with what was found.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from clmoe.bases.llava import LoadedBase, load_base
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import Config, load_config
from clmoe.data.batches import PromptItem, collate_prompts
from clmoe.data.prompts import encode_prompt
from clmoe.embedded.build import draw_tasks
from clmoe.errors import ClmoeError
from clmoe.evaluate.loaded import load
from clmoe.experts.model import adapter_tensors, attach_adapter, detach_adapter, load_adapter
from clmoe.methods import method_class
from clmoe.methods.base import ADAPTER_FILE, Method, Phase, TaskContext
from clmoe.train.checkpoint import checked_method, read_checkpoint
from clmoe.train.loop import TaskTrainer
from clmoe.train.task import UNION, prepare_request, train_task
from clmoe.utils.processes import device
from clmoe.utils.tensors import load_tensors, same_bits

BENCHMARK, TASKS = "playground-coin", ("sqa", "imnet")
ROWS = {"train": 24, "test": 8}
SETTINGS = (
    "training.steps=4", "training.batch_size=8", "training.save_steps=2", "training.logging_steps=1",
    "adapter.dropout=0.2",
)  # fmt: skip


class BrokenPromise(ClmoeError):  # noqa: N818 - like ``Killed``, it says what happened
    """A promise that the method does not keep."""


class Killed(BaseException):
    """Ends a training as ``kill -9`` does: nobody catches it."""


def require(kept: bool, found: str) -> None:
    """Raise BrokenPromise, saying what was found, unless the promise is kept."""
    if not kept:
        raise BrokenPromise(found)


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Raise BrokenPromise, naming the first tensor that differs in name or bits."""
    odd = sorted(found.keys() ^ expected.keys())
    require(not odd, f"{what}: {odd[:3]} are only on one side")
    for name, value in expected.items():
        require(same_bits(found[name], value), f"{what}: {name} differs")


# ---- The checks, of a method wherever it is trained


@torch.no_grad()
def fresh_adapter_changes_nothing(method: Method, base: LoadedBase, batch: dict[str, Tensor]) -> list[str]:
    """The logits of ``batch`` are the base's, bit for bit. Returns the names of the parameters that train."""
    plain = base.model(**batch).logits
    model = attach_adapter(base.model, method.adapter(base))
    found = model.eval()(**batch).logits
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    detach_adapter(model)
    require(same_bits(found, plain), f"the logits move by up to {float((found - plain).abs().max()):.3g}")
    return trained


def base_is_as_before(base: LoadedBase, before: dict[str, Tensor]) -> None:
    """After training, the base has no adapter and every tensor has its old bits."""
    require_same(base.model.state_dict(), before, "the base after training")
    thawed = [name for name, p in base.model.named_parameters() if p.requires_grad]
    require(not thawed, f"parameters of the base that train: {thawed[:3]}")


def checkpoint_loads_bit_for_bit(checkpoint: Path, base: LoadedBase, root: Path) -> None:
    """Its tensors arrive as they are in the file, the counts are right, and no file names the folder ``root``."""
    for path in checkpoint.iterdir():
        require(str(root).encode() not in path.read_bytes(), f"{path.name} holds an absolute path")
    done, saved = read_checkpoint(checkpoint), load_tensors(checkpoint / ADAPTER_FILE)
    model = load_adapter(base.model, checkpoint, trainable=False)
    live = {name: value.clone() for name, value in adapter_tensors(model).items()}
    detach_adapter(model)
    require_same(live, saved, "the loaded checkpoint")
    stored = sum(value.numel() for value in saved.values())
    require(done.lineage.adapter_parameters == stored, f"{done.lineage.adapter_parameters} parameters, {stored} stored")


def starts_from_its_parent(kind: type[Method], parent: Path, train: Callable[[], Any]) -> None:
    """``train`` trains the task after ``parent``: it must begin with the parent's weights, bit for bit."""
    start: dict[str, Tensor] = {}
    phases = kind.phases

    def spy(self: Method, context: TaskContext) -> list[Phase]:
        start.update({name: value.detach().clone() for name, value in adapter_tensors(context.model).items()})
        return phases(self, context)

    with replaced(kind, "phases", spy):
        train()
    require_same(start, load_tensors(parent / ADAPTER_FILE), "the start of the second task")


def killed_it_ends_in_the_same_bytes(
    kind: type[Method], train: Callable[[], Path], straight: Path, step: int = 2
) -> None:
    """``train`` makes ``straight`` again; it is killed before step ``step``, at the task's end, and then not at all."""
    seen: list[int] = []
    real = TaskTrainer.training_step

    def die(*unused: Any, **also_unused: Any) -> Any:
        raise Killed

    def die_at_the_step(self: TaskTrainer, *arguments: Any, **named: Any) -> Tensor:
        seen.append(step)
        return die() if len(seen) > step else real(self, *arguments, **named)

    for owner, name, value in ((TaskTrainer, "training_step", die_at_the_step), (kind, "end_task", die)):
        with replaced(owner, name, value):
            try:
                train()
            except Killed:
                continue
            raise BrokenPromise(f"the training never reached {name}")
    made = train()
    names = {path.name for folder in (made, straight) for path in folder.iterdir()}
    for name in sorted(names):
        files = (made / name, straight / name)
        require(all(file.is_file() for file in files), f"{name} is only in one of the two checkpoints")
        require(files[0].read_bytes() == files[1].read_bytes(), f"{name} has different bytes than without interruption")


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, the class ``owner`` has another ``name``."""
    own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before) if own else delattr(owner, name)


# ---- The trial on the embedded base


@dataclass(frozen=True)
class Trial:
    """A method on two small tasks of the embedded benchmark, whose files and checkpoints are in ``folder``."""

    method: str
    settings: tuple[str, ...]
    folder: Path

    @cached_property
    def benchmark(self) -> Benchmark:
        data = self.folder / "data"
        draw_tasks(data, TASKS, ROWS)
        whole = load_benchmark(BENCHMARK, data, check_files=False)
        return replace(whole, tasks=tuple(map(whole.task, TASKS)))

    @cached_property
    def config(self) -> Config:
        settings = [*SETTINGS, *self.settings]
        return load_config(self.method, self.benchmark.recipe, settings, None, checked_method, BENCHMARK)

    @cached_property
    def kind(self) -> type[Method]:
        return method_class(self.config.method)

    @cached_property
    def first(self) -> Path:
        """The checkpoint of the first task, or of the union."""
        return self.train("first", UNION if self.kind.chain == "union" else TASKS[0])

    @cached_property
    def second(self) -> Path:
        return self.train("second", TASKS[1], self.first)

    def base(self) -> LoadedBase:
        return load_base(self.config.model, device())

    def train(self, name: str, task: str, previous: Path | None = None, base: LoadedBase | None = None) -> Path:
        output = self.folder / name / task
        done = None if previous is None else read_checkpoint(previous)
        train_task(prepare_request(self.config, self.benchmark, task, list(TASKS), done, output), base)
        return output

    # ---- the promises

    def describes_itself(self) -> None:
        require(bool(self.kind.__doc__), f"class {self.kind.__name__} has no docstring")
        require(self.kind.chain in ("sequence", "fresh", "union", "none"), f"chain: {self.kind.chain!r} is unknown")

    def changes_nothing_at_first(self) -> None:
        base = self.base()
        ids = torch.tensor(encode_prompt("What is it?", False, base.tokenizer, base.image_token_count))
        batch = collate_prompts([PromptItem(ids, None)], base.tokenizer.pad_token_id)
        batch = {name: value.to(base.device) for name, value in batch.items()}
        require(bool(fresh_adapter_changes_nothing(self.kind(self.config), base, batch)), "nothing trains")

    def leaves_the_base_alone(self) -> None:
        base = self.base()
        before = {name: value.clone() for name, value in base.model.state_dict().items()}
        self.train("base", self.first.name, base=base)
        base_is_as_before(base, before)

    def loads(self) -> None:
        checkpoint_loads_bit_for_bit(self.first, self.base(), self.folder)

    def starts_from_the_parent(self) -> None:
        starts_from_its_parent(self.kind, self.first, lambda: self.train("start", TASKS[1], self.first))

    def survives_a_kill(self) -> None:
        killed_it_ends_in_the_same_bytes(self.kind, lambda: self.train("killed", TASKS[1], self.first), self.second)

    def answers(self) -> None:
        told = {"locator": "oracle", "task": TASKS[0]} if self.kind.keeps_parts else {}
        load(self.first).answer(None, "What is it?", max_new_tokens=4, **told)


ALWAYS, CHAINED = ("sequence", "fresh", "union"), ("sequence", "fresh")
PROMISES: dict[str, tuple[Callable[[Trial], None], tuple[str, ...]]] = {
    "its class has a docstring and a known chain": (Trial.describes_itself, (*ALWAYS, "none")),
    "a fresh adapter changes no logit of the base": (Trial.changes_nothing_at_first, ALWAYS),
    "training leaves the base as it was, bit for bit": (Trial.leaves_the_base_alone, ALWAYS),
    "a checkpoint loads bit for bit and holds no absolute path": (Trial.loads, ALWAYS),
    "the second task starts from the first one's weights": (Trial.starts_from_the_parent, ("sequence",)),
    "killed while it trains and as it ends, it ends in the same bytes": (Trial.survives_a_kill, CHAINED),
    "a checkpoint answers": (Trial.answers, ALWAYS),
}
"""What ``clmoe check-method`` tries, and for which ``Method.chain``."""


def check_method(method: str, settings: list[str]) -> Iterator[tuple[str, str]]:
    """Try every promise; yields each with what is wrong, or empty if kept. Raises ClmoeError for an unknown method."""
    with TemporaryDirectory(prefix="clmoe-check-") as folder:
        trial = Trial(method, tuple(settings), Path(folder).resolve())
        for promise, (check, chains) in PROMISES.items():
            if trial.kind.chain in chains or check is Trial.describes_itself:
                try:
                    check(trial)
                except Exception as error:  # of any kind: it is the method's
                    yield promise, str(error) if isinstance(error, ClmoeError) else repr(error)
                else:
                    yield promise, ""
