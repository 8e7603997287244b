"""LLaVA-1.5 at its true width with few of its layers, on a CPU; scripts/rehearse.sh runs the first three.

    python scripts/bench/rehearse.py memory [--model llava-1.5-7b] [--layers 2 3] [--methods lora ...]
    python scripts/bench/rehearse.py make FOLDER [--layers 2]
    python scripts/bench/rehearse.py run FOLDER OUT [--methods lora ...] [--checkpointing off on] [--dtype D]
    python scripts/bench/rehearse.py structure

`memory` counts, tensor by tensor, what a method's step of one record of 640 tokens holds, and prints it beside what
`clmoe plan` says: bfloat16 weights, 576 image tokens, two layers of the tower, without and with checkpointing. From two
numbers of layers follows the whole model's. `make` writes such a base and a benchmark of two tasks; `run` takes
each method through both, one step each: train, seal, continue, grow, locate, evaluate, without and with checkpointing.
`structure` prints what each method trains and saves at full size, from the meta device, and its share of 8 GPUs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import weakref
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import yaml
from clock import Peak, timed
from five_questions import QUESTIONS, random_base, records, write_images
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlavaProcessor

from clmoe.bases.llava import meta_base, shapes_file
from clmoe.config import Config, load_config
from clmoe.experts.model import adapter_tensors, attach_adapter
from clmoe.methods import method_class
from clmoe.plan import activation_bytes, first_task, state_bytes
from clmoe.plan.cost import step_flops
from clmoe.train.loop import TrainedModel, enable_checkpointing
from clmoe.utils.files import read_json

GIB = 2**30
METHODS = ("lora", "olora", "moelora", "clmoe", "clmoe_released", "llava_cmoe")
PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm}
ANSWERS = 16  # tokens of each record, as the plan counts them


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and nothing has freed yet.

    Unless it ``computes``, matrix products are zeros of the right shape: minutes become seconds, with the same tensors.
    """

    def __init__(self, computes: bool) -> None:
        super().__init__()
        self.computes = computes
        self.now = self.most = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.computes and func.overloadpacket in PRODUCTS:
            a, b = args[-2:]
            in_place = func.overloadpacket is torch.ops.aten.addmm_
            result = args[0] if in_place else a.new_zeros(*a.shape[:-1], b.shape[-1])
        else:
            result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if size and key not in self.seen:
            self.seen.add(key)
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


@dataclass(frozen=True)
class Step:
    """Bytes of an optimizer step: what it holds throughout, and the peak above it; CPU seconds; the process's peak."""

    state: int
    peak: int
    seconds: float
    process: float


def measured(config: Config, samples: int, tokens: int, computes: bool = True) -> tuple[Step, Step]:
    """An optimizer step with constant weights, without and with recomputation; ``computes``: see ``Alive``."""
    method, found, most = method_class(config.method)(config), [], Peak()
    with Alive(computes) as alive, patch.object(torch.nn.functional, "dropout", _dropout):
        loaded = meta_base(shapes_file(config.model))
        base = loaded.model.to(getattr(torch, config.model.dtype)).to_empty(device="cpu")
        base.set_attn_implementation(config.model.attention)
        for tensor in (*base.parameters(), *base.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.copy_(torch.arange(tensor.numel())[None])
        trained = TrainedModel(attach_adapter(base, method.adapter(loaded)), method, samples).train()
        parameters = [p for p in trained.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
        state = alive.now
        ids, labels = torch.full((samples, tokens), 5), torch.full((samples, tokens), -100)
        ids[:, 2 : 2 + loaded.image_token_count] = base.config.image_token_index
        labels[:, -ANSWERS - 4 : -4] = 7
        mask, side = torch.ones_like(ids), base.config.vision_config.image_size
        mask[0, -3:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": torch.tensor(16)}
        inputs["pixel_values"] = torch.randn(samples, 3, side, side).to(base.dtype)

        def step() -> None:
            trained(**inputs)["loss"].backward()
            optimizer.step()

        for recompute in (False, True):
            if recompute:
                enable_checkpointing(trained.model)
            before = alive.most = alive.now
            seconds, _ = timed(step)
            found.append(Step(state, alive.most - before, seconds, most.mib() / 1024))
    return found[0], found[1]


def _dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """With a mask of bytes, as on a GPU; a CPU's has the type of ``x``."""
    return torch.native_dropout(x, p, training)[0]


def cut(model: str, layers: int) -> dict[str, Any]:
    """The shapes of a model in ``configs/models`` with so many decoder layers, and two of the tower's."""
    shapes = read_json(shapes_file(load_config("lora", {}, [], model).model))
    shapes["text_config"]["num_hidden_layers"], shapes["vision_config"]["num_hidden_layers"] = layers, 2
    return shapes


def planned(config: Config, samples: int, tokens: int) -> tuple[int, int, int]:
    """State, and activations without and with recomputation."""
    first = first_task(method_class(config.method)(config))
    kept = [activation_bytes(first, samples, tokens, again) for again in (False, True)]
    return sum(state_bytes(first).values()), *kept


def memory(model: str, layers: list[int], names: list[str], samples: int, tokens: int, computes: bool) -> None:
    """Print the table's rows; with two numbers of layers, also the whole model's by the line through both."""
    print("| model | layers | method | part | measured, GiB | planned, GiB | measured : planned |")
    print("|---|---:|---|---|---:|---:|---:|")
    whole = read_json(shapes_file(load_config("lora", {}, [], model).model))["text_config"]["num_hidden_layers"]
    parts = ("state", "activations", "activations, checkpointing")
    for name in names:
        rows: dict[int, list[int]] = {}
        for number in layers:
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(cut(model, number)))
                config = load_config(name, {}, ["model.dtype=bfloat16"], folder)
                figures = planned(config, samples, tokens)
                plain, again = measured(config, samples, tokens, computes)
                first = first_task(method_class(config.method)(config))
            gc.collect()
            rows[number] = [plain.state, plain.peak, again.peak]
            show(model, number, name, parts, rows[number], figures)
            if not computes:
                continue
            adapter = first.count("expert") + first.count("router")
            shapes, tuned = first.model.get_base_model().config, first.count("projector") > 0
            work = step_flops(shapes, samples, tokens, samples * ANSWERS, adapter, tuned)
            cost = (
                f"{1e3 * plain.seconds / samples / tokens:.2f} CPU ms a token, {work / plain.seconds / 1e9:.0f} GFLOP/s"
            )
            print(f"# {name}, {number} layers: {cost}; process {plain.process:.2f} GiB at its peak", flush=True)
        if len(layers) == 2:
            low, high = (rows[number] for number in layers)
            slope = [(b - a) / (layers[1] - layers[0]) for a, b in zip(low, high, strict=True)]
            line = [a + (whole - layers[0]) * s for a, s in zip(low, slope, strict=True)]
            with TemporaryDirectory() as folder:
                (Path(folder) / "config.json").write_text(json.dumps(cut(model, whole)))
                figures = planned(load_config(name, {}, ["model.dtype=bfloat16"], folder), samples, tokens)
            show(model, whole, name, parts, line, figures)


def show(model: str, layers: int, name: str, parts: Any, found: Any, figures: Any) -> None:
    for part, got, said in zip(parts, found, figures, strict=True):
        print(f"| {model} | {layers} | {name} | {part} | {got / GIB:.3f} | {said / GIB:.3f} | {got / said:.3f} |")


def structure() -> None:
    """A row for each model and method: a first task's trained millions, tensors and MB of its file, MB of each GPU."""
    print("| model | method | trained, M | tensors | file, MB | gradients and optimizer of one of 8 GPUs, MB |")
    print("|---|---|---:|---:|---:|---:|")
    for model in ("llava-1.5-7b", "llava-1.5-13b"):
        for name in METHODS:
            config = load_config(name, {}, [], model)
            first = first_task(method_class(config.method)(config))
            saved, share = adapter_tensors(first.model), state_bytes(first, 8, "zero2")
            size = sum(tensor.nbytes for tensor in saved.values()) / 1e6
            own = (share["gradients"] + share["optimizer"]) / 1e6
            print(f"| {model} | {name} | {first.count() / 1e6:.2f} | {len(saved)} | {size:.1f} | {own:.1f} |")


def make(folder: Path, model: str, layers: int) -> None:
    """Write a base with random weights and a benchmark of two tasks on it."""
    base = random_base(cut(model, layers))
    base.model.save_pretrained(folder / "base")
    how = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(image_processor=base.image_processor, tokenizer=base.tokenizer, **how)
    processor.save_pretrained(folder / "base")
    images = write_images(folder / "images", 1, 336)
    rows = [
        {
            "id": record.id,
            "image": record.image,
            "conversations": [
                {"from": "human", "value": f"<image>\n{record.turns[0].question}"},
                {"from": "gpt", "value": record.turns[0].answer},
            ],
        }
        for record in records(images)
    ]
    tests = [
        {"question_id": row["id"], "image": row["image"], "text": QUESTIONS[k % 5], "answer": "red"}
        for k, row in enumerate(rows)
    ]
    (folder / "train.json").write_text(json.dumps(rows))
    (folder / "test.json").write_text(json.dumps(tests))
    files = {"train": "train.json", "test": "test.json", "images": "images", "scorer": "short_answer"}
    tasks = [{"name": name, "max_new_tokens": 2, **files} for name in ("first", "second")]
    benchmark = {"name": "rehearsal", "root": str(folder.resolve()), "tasks": tasks}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))


def run(folder: Path, out: Path, names: list[str], checkpointing: list[str], dtype: str) -> None:
    """Print a row for each ``clmoe run``: CPU seconds, the process's peak, and whether the adapter is the same."""
    print("| method | dtype | checkpointing | CPU s | peak of the process, GiB | second task's adapter |")
    print("|---|---|---|---:|---:|---|")
    settings = ["training.steps=1", "training.batch_size=1", "evaluation.batch_size=2", "evaluation.limit=2"]
    growth = ["options.extend=every", "options.probe_min_steps=1", "locator.options.steps=10"]
    adapters: dict[str, bytes] = {}
    for state, name in itertools.product(checkpointing, names):
        own = [f"training.gradient_checkpointing={'true' if state == 'on' else 'false'}", f"model.dtype={dtype}"]
        own += growth if name == "llava_cmoe" else []
        run = out / f"{name}-{dtype}-{state}"
        where = [str(folder / "benchmark.yaml"), "--base", str(folder / "base"), "--output", str(run)]
        process = subprocess.Popen([sys.executable, "-m", "clmoe.cli", "run", name, *where, *settings, *own])
        _, status, used = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"rehearse: clmoe run {name} failed")
        (sealed,) = run.glob("02_*/adapter_model.safetensors")
        adapter = sealed.read_bytes()
        same = "" if name not in adapters else "same bytes" if adapter == adapters[name] else "differs"
        adapters.setdefault(name, adapter)
        seconds, peak = used.ru_utime + used.ru_stime, used.ru_maxrss / 2**20
        row = f"| `{name}` | {dtype} | {state} | {seconds:.0f} | {peak:.2f} | {same} |"
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for name in ("memory", "make"):
        verbs.add_parser(name).add_argument("--model", default="llava-1.5-7b")
    verbs.choices["make"].add_argument("folder", type=Path)
    verbs.choices["make"].add_argument("--layers", type=int, default=2)
    verbs.choices["memory"].add_argument("--layers", type=int, nargs="+", default=[2, 3])
    verbs.add_parser("run").add_argument("folder", type=Path)
    verbs.choices["run"].add_argument("out", type=Path)
    verbs.choices["run"].add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["off", "on"])
    verbs.choices["run"].add_argument("--dtype", default="bfloat16")
    for name in ("memory", "run"):
        verbs.choices[name].add_argument("--methods", nargs="+", default=list(METHODS))
    verbs.choices["memory"].add_argument("--compute", action="store_true", help="matrix products too, with their time")
    verbs.add_parser("structure")
    args = parser.parse_args()
    if args.verb == "structure":
        structure()
    elif args.verb == "make":
        make(args.folder, args.model, args.layers)
    elif args.verb == "run":
        run(args.folder, args.out, args.methods, args.checkpointing, args.dtype)
    else:
        memory(args.model, args.layers, args.methods, 1, 640, args.compute)


if __name__ == "__main__":
    main()
