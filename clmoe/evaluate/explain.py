"""One question answered with its reasons: every task's score, and what each router mixed the experts with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from clmoe.data.batches import prompt_dataset, to_device
from clmoe.data.collate import PromptItem, collate_prompts
from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.generate import Answerer
from clmoe.evaluate.location import known_tasks
from clmoe.model.adapter import ExpertLinear, adapted_llava, expert_config, expert_layers
from clmoe.model.routing import RouterChoice, RouteSelection, RouteTrace, routing
from clmoe.utils.names import unknown


@dataclass(frozen=True)
class RouterWeights:
    """What one router mixed its experts with, on the mean over the prompt's tokens.

    Attributes:
        block: decoder block.
        linear: the linear that the router serves; empty where it serves the whole FFN.
        owners: position in training order of the task that each expert of the block belongs to, oldest first;
            negative for experts that were there before the first task.
        weights: of the oldest experts, as many as the router reaches; they sum to 1.
    """

    block: int
    linear: str
    owners: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Explanation:
    """An answer and what led to it.

    Attributes:
        text: the answer, or its beginning while it is being generated.
        task: whose routers serve the question; None for methods that do not choose.
        scores: decider -> task -> how typical the question is of the task, largest wins; the decider that counts
            first. Empty for methods that do not choose.
        routers: in model order; empty for methods without experts.
    """

    text: str
    task: str | None
    scores: dict[str, dict[str, float]]
    routers: list[RouterWeights]


def explain(
    answerer: Answerer,
    learned: list[str],
    question: Question,
    image_root: Path,
    max_new_tokens: int,
    router: RouterChoice = "located",
    task: str | None = None,
    watch: Callable[[Explanation], None] = lambda partial: None,
) -> Explanation:
    """Answer one question and say why.

    Args:
        learned: the checkpoint's tasks, in training order.
        task: the question's task, for the oracle.
        watch: called with the reasons before the first token and with the text so far before every further one.
    """
    oracle = oracle_index(router, task, learned)
    scores = answerer.task_scores([question], image_root)
    index = None
    if scores:
        known = known_tasks(router, [question.question_id], len(learned), oracle, answerer.method.config.seed)
        index = int((next(iter(scores.values())).argmax(1) if known is None else known)[0])
    selection = answerer.selection([index])
    prompt = prompt_dataset(answerer.base, [question], image_root)[0]
    reasons = Explanation(
        "",
        None if index is None else learned[index],
        {name: dict(zip(learned, found[0].tolist(), strict=True)) for name, found in scores.items()},
        router_weights(answerer, prompt, selection),
    )
    watch(reasons)
    (text,), _ = answerer.generate(
        [prompt], selection, max_new_tokens, lambda texts: watch(replace(reasons, text=texts[0].strip()))
    )
    return replace(reasons, text=text.strip())


def oracle_index(router: RouterChoice, task: str | None, learned: list[str]) -> int | None:
    """Position of the task that the caller names for the oracle, None for the other routers.

    Raises:
        ClmoeError: the oracle without a task that was learned, or a task without the oracle.
    """
    if router == "oracle":
        if task not in learned:
            raise ClmoeError(f"router 'oracle' needs the question's task: {unknown('task', str(task), learned)}")
        return learned.index(task)
    if task is not None:
        raise ClmoeError(f"task {task!r} is only used with router='oracle', not {router!r}")
    return None


@torch.no_grad()
def router_weights(answerer: Answerer, prompt: PromptItem, selection: RouteSelection) -> list[RouterWeights]:
    """Mean weights of the experts over the prompt's tokens, by router."""
    layers = expert_layers(answerer.model)
    if not layers:
        return []
    model = answerer.model
    trace = RouteTrace()
    inputs = to_device(collate_prompts([prompt], answerer.base.tokenizer.pad_token_id), answerer.base)
    with routing(selection, trace):
        adapted_llava(model).model(**inputs, use_cache=False)  # type: ignore[arg-type]
    layout = expert_config(model).layout  # type: ignore[arg-type]
    return [
        RouterWeights(
            int(layer.block),
            name.rpartition(".")[2] if isinstance(layer, ExpertLinear) else "",
            layout[layer.block],
            trace.outputs[name].weights[0].mean(0).tolist(),
        )
        for name, layer in layers.items()
        if name in trace.outputs  # experts that are all added up have no router
    ]
