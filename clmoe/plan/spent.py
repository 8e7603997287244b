"""What a finished sequence keeps and has computed, for the columns beside its scores; see docs/metrics.md."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from safetensors import safe_open

from clmoe.bases.llava import meta_base, shapes_file
from clmoe.benchmarks.base import Benchmark, Task
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.methods import method_class
from clmoe.methods.base import ADAPTER_FILE, Method
from clmoe.methods.memory import load_memory
from clmoe.plan import ANSWER_TOKENS, TEXT_TOKENS
from clmoe.plan.cost import answer_flops, step_flops
from clmoe.plan.shapes import image_size, shapes_of
from clmoe.train.checkpoint import MANIFEST, Finished
from clmoe.train.task import SAMPLES, by_checkpoint
from clmoe.utils.files import read_json, write_json
from clmoe.utils.paths import resolve_model_path

SPENT = "spent.json"  # in a run folder


def write_spent(run: Path, benchmark: Benchmark, config: Config, dones: list[Finished]) -> None:
    """Write ``spent.json`` of a finished sequence; None where a figure is not available.

    ``active_parameters`` of the adapter serve one token, ``locator_parameters`` are numbers that the locator stores,
    ``stored_bytes`` and ``stored_samples`` what the last checkpoint keeps for later tasks. FLOPs are those of ``clmoe
    plan``: of all training, and of one question at the end.
    """
    method = method_class(config.method)
    training, question = _flops(run, benchmark.tasks, config, dones)
    found: dict[str, int | None] = {"training_flops": training, "question_flops": question}
    if dones:
        folder = dones[-1].folder
        memory = [record for past in load_memory(folder if method.memory else None) for record in past.records]
        images = {benchmark.root / record.image for record in memory if record.image is not None}
        files = sum(file["bytes"] for file in read_json(folder / MANIFEST)["files"].values())
        there = all(image.is_file() for image in images)
        found |= {
            "active_parameters": active_parameters(folder, method),
            "locator_parameters": sum(sizes(folder / LOCATOR_FILE).values()),
            "stored_bytes": files + sum(image.stat().st_size for image in images) if there else None,
            "stored_samples": len(memory),
        }
    write_json(run / SPENT, found)


def active_parameters(checkpoint: Path, method: type[Method]) -> int:
    """The adapter's parameters that one token of a question meets.

    In a block these are the experts that its router keeps (all, if it mixes all) and the newest router; without
    routers, those of the newest task, or of all tasks if they are summed or mixed. Of soft prompts they are the tokens
    of the tasks that share a prompt. All else, such as LoRA or a trained projector, counts in full; a task router's
    gates are not weights and do not count.
    """
    adapter: dict[str, Any] = read_json(checkpoint / "adapter_config.json")
    routers, prompts = adapter.get("router_owners", []), adapter.get("prompts") or {}
    experts, total = Counter[str](), 0
    for name, size in sizes(checkpoint / ADAPTER_FILE).items():
        if ".clmoe_prompts." in name:
            total += size * min(prompts["picks"], prompts["tasks"]) if name.endswith(".prompt") else 0
        elif ".clmoe_experts." in name:
            experts[re.findall(r"\.layers\.(\d+)\.", name)[0]] += size
        elif ".clmoe_routers." not in name or f".instance.{len(routers) - 1}." in name:
            total += size
    picks = adapter.get("pick") == "task" and method.mixture is Method.mixture
    for block, size in experts.items():
        owners = adapter["layout"][block]
        used = len(owners)
        if routers:
            used = min(adapter["router_top_k"] or used, used)
        elif picks and int(block) >= adapter.get("pick_from", 0):
            used = owners.count(owners[-1])
        total += size // len(owners) * used
    return total


def sizes(path: Path) -> dict[str, int]:
    """Elements of each tensor of a safetensors file; empty if there is no file."""
    if not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        return {name: prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no mapping)


def _flops(run: Path, tasks: Sequence[Task], config: Config, dones: list[Finished]) -> tuple[int | None, int | None]:
    """FLOPs of all training steps, and of one question at the end with the pass that finds its task."""
    model = replace(config.model, path=resolve_model_path(config.model.path))
    try:
        base = meta_base(shapes_file(model))
        taken = shapes_of(base), image_size(model, base, tasks)
    except ClmoeError:  # the base is no longer where the training found it
        return None, None
    method, samples, training = method_class(config.method), by_checkpoint(run / SAMPLES), 0
    tokens = min(taken[1].tokens + TEXT_TOKENS, config.training.max_length)
    tuned, again = config.adapter.train_projector, config.training.gradient_checkpointing
    adapter = soft = 0
    for learned, done in enumerate(dones, start=1):
        soft = method(config).soft_tokens(learned)
        parts = sizes(done.folder / ADAPTER_FILE).items()
        adapter = sum(size for name, size in parts if re.search(r"lora_|\.clmoe_(experts|routers)\.", name))
        trained = done.lineage.trainable_parameters if method.chain == "fresh" else adapter
        step = step_flops(*taken, 1, tokens + soft, min(ANSWER_TOKENS, tokens), trained, tuned, again)
        training += step * sum(samples.get(done.folder.name, {}).values())
    question = answer_flops(*taken, tokens + soft, adapter)
    if method.keeps_parts:
        locator = make_locator(config.locator, config.seed)
        question += answer_flops(*taken, tokens, adapter if locator.asks else 0) * (locator.looks or locator.asks)
    complete = all(done.folder.name in samples for done in dones)  # older versions recorded none
    return training if complete else None, question
