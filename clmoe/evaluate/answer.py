"""A checkpoint that answers questions: find the task, route, generate."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.evaluation import Checkpoint
from clmoe.evaluate.explain import Explanation, explain, oracle_index
from clmoe.evaluate.generate import Answerer
from clmoe.methods.base import method_class
from clmoe.model.llava import LoadedBase, load_base
from clmoe.model.routing import RouterChoice
from clmoe.train.lineage import read_checkpoint
from clmoe.utils.processes import device

if TYPE_CHECKING:
    from torch import nn


def open_answerer(checkpoint: Checkpoint, base: LoadedBase | None = None, features: Path | None = None) -> Answerer:
    """Load a checkpoint (onto ``base`` if it is loaded already) for answering; ``features`` as for ``Answerer``.

    Raises:
        ClmoeError: the model in the configuration is not the base that the adapter was trained on.
    """
    config = checkpoint.config
    if base is None:
        base = load_base(config.model, device())
    model: nn.Module = base.model
    if checkpoint.folder is not None:
        from clmoe.model.adapter import experts_by_linear, load_adapter

        if checkpoint.base != base.fingerprint:
            raise ClmoeError(f"{checkpoint.folder} was trained on another base than {config.model.path}")
        model = load_adapter(base.model, checkpoint.folder, trainable=False)
        for experts in experts_by_linear(model).values():
            experts.freeze_as(base.model.dtype)
    method = method_class(config.method)(config)
    return Answerer(base, model, method, checkpoint.folder, len(checkpoint.learned), config.evaluation, features)


class LoadedCheckpoint:
    """A finished checkpoint ready to answer; made by ``clmoe.load``.

    Attributes:
        learned: its tasks, in training order.
    """

    def __init__(self, answerer: Answerer, learned: list[str]) -> None:
        self.answerer, self.learned = answerer, learned

    @property
    def finds_task(self) -> bool:
        """Answers depend on the question's task, so ``router`` has a meaning."""
        return self.answerer.method.finds_task

    def answer(
        self,
        image: Path | str | None,
        question: str,
        max_new_tokens: int = 64,
        router: RouterChoice = "located",
        task: str | None = None,
    ) -> str:
        """Answer one question about one image (None: text only); the task is found from the question itself.

        Args:
            router: ``oracle`` takes ``task``, ``last`` the newest task, ``random`` one drawn from the question.

        Raises:
            ClmoeError: the oracle without a task that was learned, or a task without the oracle.
        """
        asked, root = _asked(image, question)
        index = oracle_index(router, task, self.learned)
        (answer,) = self.answerer.answer([asked], root, max_new_tokens, router, index)
        return answer.text

    def explain(
        self,
        image: Path | str | None,
        question: str,
        max_new_tokens: int = 64,
        router: RouterChoice = "located",
        task: str | None = None,
        watch: Callable[[Explanation], None] = lambda partial: None,
    ) -> Explanation:
        """As ``answer``, with the reasons: the task, every task's score, and the experts' weights.

        Args:
            watch: called with the reasons before the first token and with the text so far before every further one.
        """
        asked, root = _asked(image, question)
        return explain(self.answerer, self.learned, asked, root, max_new_tokens, router, task, watch)


def _asked(image: Path | str | None, question: str) -> tuple[Question, Path]:
    """A question of its own, and the folder of its image; its id, which the random router looks at, is its text."""
    path = None if image is None else Path(image).resolve()
    if path is None:
        return Question(question, None, question, "", {}), Path()
    return Question(question, path.name, question, "", {}), path.parent


def load(folder: Path | str, model: str | None = None) -> LoadedCheckpoint:
    """Open a checkpoint folder: ``clmoe.load("runs/x/08_digits").answer("photo.png", "What is this?")``.

    Args:
        model: folder or hub name of the checkpoint's base, where it is no longer where the training found it.

    Raises:
        ClmoeError: not a finished checkpoint, damaged, or its base cannot be loaded or is another one.
    """
    done = read_checkpoint(Path(folder), [] if model is None else [f"model.path={json.dumps(model)}"])
    tasks = done.lineage.tasks
    return LoadedCheckpoint(
        open_answerer(Checkpoint(done.folder, done.identity, tasks[-1], tasks, done.config, done.lineage.base)), tasks
    )
