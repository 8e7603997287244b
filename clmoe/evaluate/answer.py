"""A checkpoint that answers questions: find the task, route, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.evaluation import Checkpoint
from clmoe.evaluate.generate import Answer, Answerer
from clmoe.methods.base import method_class
from clmoe.model.llava import LoadedBase, load_base
from clmoe.model.routing import RouterChoice
from clmoe.train.lineage import read_checkpoint

if TYPE_CHECKING:
    from torch import nn


def open_answerer(checkpoint: Checkpoint, base: LoadedBase | None = None, features: Path | None = None) -> Answerer:
    """Load a checkpoint (onto ``base`` if it is loaded already) for answering; ``features`` as for ``Answerer``.

    Raises:
        ClmoeError: the model in the configuration is not the base that the adapter was trained on.
    """
    import torch

    config = checkpoint.config
    if base is None:
        base = load_base(config.model, "cuda" if torch.cuda.is_available() else "cpu")
    model: nn.Module = base.model
    if checkpoint.folder is not None:
        from clmoe.model.adapter import load_adapter

        if checkpoint.base != base.fingerprint:
            raise ClmoeError(f"{checkpoint.folder} was trained on another base than {config.model.path}")
        model = load_adapter(base.model, checkpoint.folder, trainable=False)
    method = method_class(config.method)(config)
    return Answerer(base, model, method, checkpoint.folder, len(checkpoint.learned), config.evaluation, features)


class LoadedCheckpoint:
    """A finished checkpoint ready to answer; made by ``clmoe.load``."""

    def __init__(self, answerer: Answerer, learned: list[str]) -> None:
        self.answerer, self.learned = answerer, learned

    def answer(
        self,
        image: Path | str | None,
        question: str,
        max_new_tokens: int = 64,
        router: RouterChoice = "located",
    ) -> str:
        """Answer one question about one image (None: text only); the task is found from the question itself."""
        return self.explain(image, question, max_new_tokens, router).text

    def explain(
        self,
        image: Path | str | None,
        question: str,
        max_new_tokens: int = 64,
        router: RouterChoice = "located",
    ) -> Answer:
        """As ``answer``, with the chosen task's index in ``learned`` and the decision margin."""
        path = None if image is None else Path(image).resolve()
        asked = Question("0", None if path is None else path.name, question, "", {})
        root = Path() if path is None else path.parent
        (answer,) = self.answerer.answer([asked], root, max_new_tokens, router)
        return answer


def load(folder: Path | str) -> LoadedCheckpoint:
    """Open a checkpoint folder: ``clmoe.load("runs/x/08_digits").answer("photo.png", "What is this?")``.

    Raises:
        ClmoeError: not a finished checkpoint, damaged, or its base cannot be loaded.
    """
    done = read_checkpoint(Path(folder))
    tasks = done.lineage.tasks
    return LoadedCheckpoint(
        open_answerer(Checkpoint(done.folder, done.identity, tasks[-1], tasks, done.config, done.lineage.base)), tasks
    )
