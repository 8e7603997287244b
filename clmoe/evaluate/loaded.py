"""``clmoe.load``: a checkpoint that answers one question about one image, with its reasons on request."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from clmoe.bases.inputs import prompt_dataset, to_device
from clmoe.data.batches import PromptItem, collate_prompts
from clmoe.data.images import to_rgb
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.answer import Answerer, open_answerer
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import ExpertLinear, expert_layers
from clmoe.experts.model import expert_config
from clmoe.experts.routing import RouteSelection, RouteTrace, routing
from clmoe.train.checkpoint import read_checkpoint
from clmoe.utils.names import unknown
from clmoe.utils.schema import told

ImageSource = Path | str | Image.Image | None


@dataclass(frozen=True)
class RouterWeights:
    """The weights that one router gave its experts, averaged over the prompt's tokens.

    Attributes:
        linear: the linear that the router serves; empty if it serves the whole FFN.
        owners: task number (from 0; negative: before that) of each expert of the block, oldest first.
        weights: of the oldest experts, as many as the router reaches; they sum to 1.
    """

    block: int
    linear: str
    owners: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Explanation:
    """An answer, or its beginning while it is being generated, and what led to it.

    Attributes:
        task: the one that the question was assigned to; None for methods without parts.
        scores: task -> how typical the checkpoint's own locator finds the question of it; empty without parts.
        routers: in model order; empty for methods without experts.
    """

    text: str
    task: str | None
    scores: dict[str, float]
    routers: list[RouterWeights]


class LoadedCheckpoint:
    """A finished checkpoint ready to answer; made by ``clmoe.load``. ``learned``: its tasks in training order."""

    def __init__(self, answerer: Answerer, learned: list[str]) -> None:
        self.answerer, self.learned = answerer, learned

    @property
    def keeps_parts(self) -> bool:
        """Whether answers depend on the question's task, which a locator finds."""
        return self.answerer.method.keeps_parts

    @told('answer("photo.png", "What is this?"), or answer(None, "...") without an image')
    def answer(
        self, image: ImageSource, question: str, max_new_tokens: int = 64, locator: str = "", task: str | None = None
    ) -> str:
        """Answer one question about one image (a path, a PIL image, or None for text only).

        The checkpoint's own locator finds the task; ``locator="oracle"`` takes ``task``, ``"last"`` the newest task,
        and ``"random"`` one drawn from the question. Raises ClmoeError for another kind of image, the oracle without a
        learned task, or a task without the oracle.
        """
        with _asked(image, question) as (asked, root):
            (answer,) = self.answerer.answer([asked], root, max_new_tokens, locator, self._oracle(locator, task))
        return answer.text

    @told('explain("photo.png", "What is this?"), or explain(None, "...") without an image')
    def explain(
        self,
        image: ImageSource,
        question: str,
        max_new_tokens: int = 64,
        locator: str = "",
        task: str | None = None,
        watch: Callable[[Explanation], None] = lambda partial: None,
    ) -> Explanation:
        """Like ``answer``, with the reasons, which ``watch`` gets before the first token, then with the text so far."""
        oracle, answerer = self._oracle(locator, task), self.answerer
        with _asked(image, question) as (asked, root):
            found = answerer.task_scores([asked], root, locator, oracle)
            own_looks = answerer.own is not None and answerer.own.looks
            scores = answerer.task_scores([asked], root) if locator and own_looks else found
            prompt = prompt_dataset(answerer.prompted, [asked], root)[0]
        index = None if found is None else int(found[0].argmax())
        selection = answerer.selection([index], found)
        reasons = Explanation(
            text="",
            task=None if index is None else self.learned[index],
            scores={} if scores is None else dict(zip(self.learned, scores[0].tolist(), strict=True)),
            routers=_router_weights(answerer, prompt, selection),
        )
        watch(reasons)
        (text,), _ = answerer.generate(
            [prompt], selection, max_new_tokens, lambda texts: watch(replace(reasons, text=texts[0].strip()))
        )
        return replace(reasons, text=text.strip())

    def _oracle(self, locator: str, task: str | None) -> int | None:
        """Position of the task that the caller names for the oracle."""
        oracle = (locator or self.answerer.method.config.locator.name) == "oracle"
        if not oracle and task is not None:
            raise ClmoeError(f"task {task!r} is only used with locator='oracle', not {locator!r}")
        if oracle and self.keeps_parts and task not in self.learned:
            raise ClmoeError(f"locator 'oracle' needs the question's task: {unknown('task', str(task), self.learned)}")
        return None if task is None else self.learned.index(task)


@contextmanager
def _asked(image: ImageSource, question: str) -> Iterator[tuple[Question, Path]]:
    """A question with its text as id, which the random locator reads, and the folder of its image, while it lasts."""
    if not question.strip():
        raise ClmoeError("question: it is empty")
    with TemporaryDirectory() as folder:
        if isinstance(image, Image.Image):  # as a file, so that all images take the same path
            to_rgb(image).save(Path(folder) / "image.png")
            image = Path(folder) / "image.png"
        path = Path() if image is None else Path(image).resolve()
        yield Question(question, path.name or None, question, "", {}), path.parent


@torch.no_grad()
def _router_weights(answerer: Answerer, prompt: PromptItem, selection: RouteSelection) -> list[RouterWeights]:
    model, trace = answerer.model, RouteTrace()
    layers = expert_layers(model)
    if not layers:
        return []
    inputs = to_device(collate_prompts([prompt], answerer.base.tokenizer.pad_token_id), answerer.base)
    with routing(selection, trace):
        adapted_base(model).base_model(**inputs, use_cache=False)
    layout = expert_config(model).layout
    return [
        RouterWeights(
            int(layer.block),
            name.rpartition(".")[2] if isinstance(layer, ExpertLinear) else "",
            layout[layer.block],
            trace.outputs[name].weights[0].mean(0).tolist(),
        )
        for name, layer in layers.items()
        if name in trace.outputs  # experts that are all summed have no router
    ]


@told('clmoe.load("runs/x/08_digits")')
def load(folder: Path | str, model: str | None = None) -> LoadedCheckpoint:
    """Open a checkpoint folder: ``clmoe.load("runs/x/08_digits").answer("photo.png", "What is this?")``.

    ``model``: folder or hub name of its base, if it is no longer where the training found it. Raises ClmoeError if the
    checkpoint is not finished or is damaged, or if its base cannot be loaded or is another one.
    """
    done = read_checkpoint(Path(folder), [] if model is None else [f"model.path={json.dumps(model)}"])
    return LoadedCheckpoint(open_answerer(done.config, done), done.lineage.tasks)
