"""Answer questions in batches, with a checkpoint's model.

Each question's task is found, then the question is routed and answered greedily; close calls are repeated alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from clmoe.bases.inputs import answer_letters, image_order, prompt_dataset, prompt_inputs
from clmoe.bases.llava import LoadedBase, load_base
from clmoe.bases.stack import CACHE
from clmoe.benchmarks.base import Benchmark, Task
from clmoe.config import Config, LocatorConfig
from clmoe.data.batches import PromptItem
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.experts.forward import FeatureStore, adapted_base, prefill
from clmoe.experts.layer import experts_by_linear
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import LETTER_ROUTER, RouteSelection, routing
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.locators.base import Asked, Locator
from clmoe.methods import method_class
from clmoe.methods.base import Method
from clmoe.train.checkpoint import Finished
from clmoe.train.task import answers_fit, training_records
from clmoe.utils.processes import device, from_main, in_order

SCORED_AT_ONCE = 256  # questions: a VAE then keeps several [draws, questions, D] tensors alive


@dataclass(frozen=True)
class Answer:
    """One question's answer.

    Attributes:
        margin: the smallest gap between the two best logits on the way.
        redone: whether the question was answered again alone.
        task: position of the task that the question was assigned to; None for methods without parts.
    """

    text: str
    margin: float
    redone: bool
    task: int | None


class Answerer:
    """Asks an adapted (or bare) base that has ``learned`` this many ``tasks``; a letter router needs their names.

    ``own`` is the locator that finds tasks, None for methods without parts; ``store`` gives its features.
    """

    def __init__(
        self,
        base: LoadedBase,
        model: PeftModel | PreTrainedModel,
        method: Method,
        learned: int,
        features: Path | None,
        tasks: Sequence[str] = (),
    ) -> None:
        self.base, self.method, self.config = base, method, method.config.evaluation
        self.prompted = replace(base, soft_tokens=method.soft_tokens(learned))
        self.model, self.learned, self.folder, self.tasks = model.eval(), learned, features, tasks
        self.use(None)

    def use(self, locator: Locator | None) -> None:
        """Find tasks with this locator from now on."""
        self.own = locator
        config = self.method.config if locator is None else replace(self.method.config, locator=locator.config)
        self.store = FeatureStore.of(self.base, config, self.folder, "prompt" if locator is None else locator.view)

    def answer(
        self,
        questions: Sequence[Question],
        image_root: Path,
        max_new_tokens: int,
        locator: str = "",
        task: int | None = None,
        known: Mapping[str, Answer] | None = None,
        finish: Callable[[list[tuple[str, Answer]]], None] = lambda batch: None,
        same: Mapping[tuple[str, int | None], Answer] | None = None,
    ) -> list[Answer]:
        """One answer per question, in order; several processes share the batches, and all get all answers.

        With ``exact``, a row whose two best logits came closer than ``margin`` is answered again in a batch of its own,
        so that the batch's rounding cannot decide.

        Args:
            locator: ``oracle``, ``last`` or ``random`` instead of the answerer's own.
            task: the questions' true task, for the oracle.
            known: answers by question id; batches that are completely in it are not computed.
            finish: called with each batch that this process computed.
            same: answers by question id and task, which hold wherever a question is assigned to this task again.
        """
        scores = self.task_scores(questions, image_root, locator, task)
        found = [None] * len(questions) if scores is None else scores.argmax(1).tolist()
        dataset = prompt_dataset(self.prompted, questions, image_root)
        ids, known = [question.question_id for question in questions], known or {}
        size, share = self.config.batch_size, self.config.share_images
        images = [question.image and (question.image if share else str(row)) for row, question in enumerate(questions)]
        order = image_order(images, [len(question.text) for question in questions])
        settled = {row: (same or {}).get((ids[row], found[row])) for row in order}
        order = [row for row in order if settled[row] is None]

        def generated(rows: list[int], redone: bool) -> list[Answer]:
            tasks = [found[row] for row in rows]
            selection = self.selection(tasks, None if scores is None else scores[rows])
            texts, margins = self.generate(dataset.__getitems__(rows), selection, max_new_tokens)
            said = zip(texts, margins, tasks, strict=True)
            return [Answer(text.strip(), margin, redone, task) for text, margin, task in said]

        def answered(rows: list[int]) -> list[Answer]:
            if all(ids[row] in known for row in rows):
                return [known[ids[row]] for row in rows]
            answers = generated(rows, redone=False)
            if self.config.exact:
                for k, answer in enumerate(answers):
                    if answer.margin < self.config.margin:
                        (answers[k],) = generated([rows[k]], redone=True)
            finish([(ids[row], answer) for row, answer in zip(rows, answers, strict=True)])
            return answers

        batches = in_order([order[start : start + size] for start in range(0, len(order), size)], answered)
        answers = settled | dict(zip(order, [answer for batch in batches for answer in batch], strict=True))
        return [answers[row] for row in range(len(questions))]  # type: ignore[misc]

    def locator(self, name: str = "") -> Locator | None:
        """The answerer's own locator, or the named one if it needs no fit (else ClmoeError); None without parts."""
        if self.own is None or not name or name == self.own.config.name:
            return self.own
        locator = make_locator(LocatorConfig(name), self.method.config.seed)
        if locator.looks or (locator.asks and not self.method.letters):
            raise ClmoeError(f"locator {name!r} is not fitted: `clmoe eval ... locator={name}` fits it")
        return locator

    def task_scores(
        self, questions: Sequence[Question], image_root: Path, locator: str = "", task: int | None = None
    ) -> Tensor | None:
        """How typical each question is of each learned task, ``[M, N]`` float64 on the CPU; None without parts."""
        finder = self.locator(locator)
        if finder is None:
            return None
        ids = [question.question_id for question in questions]
        if finder.asks:
            return finder.scores(Asked(ids, self.learned, self.letters(questions, image_root)))
        if not finder.looks:
            return finder.scores(Asked(ids, self.learned, task=task))
        features, prototypes = self.store.features(self.model, questions, image_root), self.prototypes()

        def scored(start: int) -> Tensor:
            part = slice(start, start + SCORED_AT_ONCE)
            return finder.scores(Asked(ids[part], self.learned, features[part], prototypes=prototypes))

        return torch.cat(in_order(range(0, len(ids), SCORED_AT_ONCE), scored))

    @torch.no_grad()
    def prototypes(self) -> Tensor | None:
        """What the method has learned to stand for each task, ``[N, F]`` float32; None for the methods without them."""
        if not self.method.prototypes_learned:
            return None
        return self.method.prototypes(cast(PeftModel, self.model))

    @torch.no_grad()
    def letters(self, questions: Sequence[Question], image_root: Path) -> Tensor:
        """The logits ``[M, N]`` float32 on the CPU that the model's letter router gives to the tasks' letters."""
        if self.learned == 1:  # nothing to choose, and no router yet
            return torch.zeros(len(questions), 1)
        base, size = self.base, self.config.batch_size
        letters = answer_letters(base, self.learned)
        experts = dict(zip(letters, self.tasks, strict=True))
        asked = [replace(question, text=self.method.referral(question.text, experts)) for question in questions]
        dataset = prompt_dataset(base, asked, image_root)
        llava = adapted_base(model := cast(PeftModel, self.model))

        def one(start: int) -> Tensor:
            items = dataset.__getitems__(range(start, min(start + size, len(asked))))
            selection = self.method.selection(model, torch.full((len(items),), LETTER_ROUTER))
            routes = [() if self.config.share_images else row for row in range(len(items))]
            read = prefill(llava, prompt_inputs(base, items, routes), selection, 0)
            return llava.get_output_embeddings()(read.hidden)[:, [*letters.values()]].float().cpu()

        return torch.cat(in_order(range(0, len(asked), size), one))

    def selection(self, tasks: Sequence[int | None], scores: Tensor | None = None) -> RouteSelection:
        """The routing of a batch of questions that belong to these tasks, None for methods without parts.

        If the method mixes the tasks' parts, the locator's ``scores [B, N]`` decide each part's share.
        """
        if self.own is None:
            return self.method.plain_selection()
        shares = None if scores is None else self.method.mixture(self.model, scores)
        if shares is not None:
            return RouteSelection(weights=shares.float().to(self.base.device))
        return self.method.selection(self.model, torch.tensor(tasks))

    @torch.no_grad()
    def generate(
        self,
        items: list[PromptItem],
        selection: RouteSelection,
        max_new_tokens: int,
        watch: Callable[[list[str]], None] | None = None,
    ) -> tuple[list[str], list[float]]:
        """Texts and margins of one batch: the likeliest token at each step, until every row has said an end token.

        With ``share_images``, items that hold the same ``pixel_values`` tensor and are routed alike share their prefix.
        ``watch`` gets the texts so far before every further token.
        """
        if max_new_tokens < 1:
            raise ClmoeError(f"max_new_tokens: {max_new_tokens} is out of range, it must be at least 1")
        tokenizer, count = self.base.tokenizer, len(items)
        decoded = partial(tokenizer.batch_decode, skip_special_tokens=True)
        llava = adapted_base(self.model) if isinstance(self.model, PeftModel) else self.model
        routes = selection.keys(count) if self.config.share_images else range(count)
        read = prefill(llava, prompt_inputs(self.base, items, routes), selection, max_new_tokens)
        hidden, mask, position = read.hidden, read.attention_mask, read.next_position
        tokens = mask.new_empty(count, 0)
        finished = torch.zeros(count, dtype=torch.bool, device=mask.device)
        margins = torch.full((count,), float("inf"), device=mask.device)
        ends = torch.tensor(self.base.ends, device=mask.device)
        while True:
            logits = llava.get_output_embeddings()(hidden.unsqueeze(1))[:, -1].float()
            best = logits.topk(2, dim=-1).values
            margins = torch.where(finished, margins, torch.minimum(margins, best[:, 0] - best[:, 1]))
            said = torch.where(finished, tokenizer.pad_token_id, logits.argmax(-1)).unsqueeze(1)
            tokens = torch.cat([tokens, said], dim=1)
            finished = finished | torch.isin(said[:, 0], ends)
            if tokens.shape[1] == max_new_tokens or bool(finished.all()):
                if bool(margins.isnan().any()):
                    raise ClmoeError(f"the model's logits are not finite in {llava.dtype}: choose another model.dtype")
                return decoded(tokens), margins.tolist()
            if watch is not None:
                watch(decoded(tokens))
            mask = torch.cat([mask, torch.ones_like(said)], dim=1)
            inputs = {"input_ids": said, "attention_mask": mask, "position_ids": position.unsqueeze(1)}
            with routing(selection):
                output = llava.base_model(**inputs, **{CACHE: read.cache}, use_cache=True)
            hidden, position = output.last_hidden_state[:, -1], position + 1


def open_answerer(
    config: Config,
    done: Finished | None = None,
    base: LoadedBase | None = None,
    features: Path | None = None,
    benchmark: Benchmark | None = None,
) -> Answerer:
    """Load a checkpoint, or without one the bare base, onto ``base`` if that is already loaded.

    The folder ``features`` keeps the locator's features; a locator other than the sealed one is fitted on the
    benchmark's training data. Raises ClmoeError for a checkpoint trained on another base, or for another locator
    without a benchmark.
    """
    method = method_class(config.method)(config)
    base = base or load_base(config.model, device())
    if done is None:
        return Answerer(base, base.model, method, 0, None)
    if done.lineage.base != base.fingerprint:
        raise ClmoeError(f"{done.folder} was trained on a different base from {config.model.path}")
    model = load_adapter(base.model, done.folder, trainable=False)
    for experts in experts_by_linear(model).values():
        experts.freeze_as(base.model.dtype)
    answerer = Answerer(base, model, method, len(done.lineage.tasks), features, done.lineage.tasks)
    if method.keeps_parts:
        _open_locator(config, done, answerer, benchmark)
    return answerer


def _open_locator(config: Config, done: Finished, answerer: Answerer, benchmark: Benchmark | None) -> None:
    """Use the checkpoint's own locator, or another one fitted on the training data of all learned tasks."""
    answerer.use(locator := make_locator(config.locator, config.seed))
    if not locator.fits:
        return
    if config.locator == done.locator:
        locator.load(done.folder / LOCATOR_FILE)
        return
    if benchmark is None:
        raise ClmoeError(f"{done.folder} was sealed with locator={done.locator.name}: another one needs training data")
    fit_tasks(answerer, config, [benchmark.task(task) for task in done.lineage.tasks])


def fit_tasks(answerer: Answerer, config: Config, tasks: Sequence[Task]) -> None:
    """Add these tasks to the answerer's locator, from their training data."""
    locator, features = cast(Locator, answerer.own), []
    for task in tasks:
        records = training_records(config, task, answers_fit(config, answerer.base))
        features.append(answerer.store.of_training(answerer.model, records, task.image_root, config))

    def fit() -> dict[str, Tensor]:
        for of_task in features:
            locator.fit(of_task)
        return locator.state()

    locator.load_state(from_main(fit))
