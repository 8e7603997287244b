"""LLaVA-1.5 at its true width with few of its layers, on a CPU; scripts/rehearse.sh runs the first three.

    python scripts/bench/rehearse.py memory [--model llava-1.5-7b] [--layers 2 3] [--methods lora ...]
    python scripts/bench/rehearse.py make FOLDER [--layers 2]
    python scripts/bench/rehearse.py run FOLDER OUT [--methods lora ...] [--checkpointing off on] [--dtype D]
    python scripts/bench/rehearse.py structure

`memory` counts, tensor by tensor, what a method's step of one record of 640 tokens holds, and prints it beside what
`clmoe plan` says: bfloat16 weights, 576 image tokens, two layers of the tower, without and with checkpointing. From two
numbers of layers follows the whole model's. `make` writes such a base, with Vicuna's token ids, and a benchmark of two
tasks; `run` takes each method through both with `clmoe run`: train, seal, continue, grow, locate, evaluate, without and
with checkpointing. A run of `lora` is killed after its first step and continued. `structure` prints what each method
trains and saves at full size, from the meta device, and its share of 8 GPUs.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
import yaml
from clock import Peak, timed
from five_questions import QUESTIONS, random_base, records, write_images
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaTokenizer, LlavaProcessor

from clmoe.bases.chat import TOKEN_TYPES
from clmoe.bases.llava import LoadedBase, meta_base, open_encoder, shapes_file
from clmoe.cli import main as clmoe
from clmoe.config import Config, load_config
from clmoe.data.batches import TrainItem, collate_train
from clmoe.data.prompts import IGNORE
from clmoe.experts.forward import enable_checkpointing
from clmoe.experts.model import adapter_tensors, attach_adapter
from clmoe.methods import method_class
from clmoe.plan import activation_bytes, first_task, state_bytes
from clmoe.plan.cost import step_flops
from clmoe.plan.shapes import SIZE
from clmoe.sequence import chosen
from clmoe.train.checkpoint import MANIFEST
from clmoe.train.loop import TaskTrainer, TrainedModel
from clmoe.train.task import PHASES
from clmoe.utils.files import file_sha256, read_json
from clmoe.utils.logging import read_events

sys.path.append(str(Path(__file__).resolve().parents[2]))
from tests.llama_vocabulary import llama_pieces

GIB = 2**30
METHODS = ("lora", "olora", "moelora", "clmoe", "clmoe_released", "llava_cmoe")
KILLED = "lora"  # its run with checkpointing is killed once
FLAT_PRODUCTS = {torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_}
PRODUCTS = FLAT_PRODUCTS | {torch.ops.aten.bmm}
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
COLUMNS = ("base", "method", "checkpointing", "train", "end", "locate", "evaluate", "whole, CPU s")
COLUMNS += ("CPU ms a token", "GFLOP a token", "GFLOP/s", "step's peak, GiB", "planned", "measured : planned")
COLUMNS += ("process's peak, GiB", "second task's adapter")
ANSWERS = 16  # tokens of each record, as the plan counts them


class Alive(TorchDispatchMode):
    """Counts the bytes of all storages that operations have made and nothing has freed yet.

    Unless it ``computes``, matrix products and the gradients of attention are zeros of the right shape: minutes become
    seconds, with the same tensors.
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
        elif not self.computes and func.overloadpacket is ATTENTION_BACKWARD:
            result = tuple(torch.zeros_like(tensor) for tensor in args[1:4])  # of query, key and value
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
    """Bytes of an optimizer step: what it holds throughout, and the peak above it."""

    state: int
    peak: int


def measured(config: Config, samples: int, tokens: int, computes: bool = True) -> tuple[Step, Step]:
    """An optimizer step with constant weights, without and with recomputation; ``computes``: see ``Alive``."""
    method, found = method_class(config.method)(config), list[Step]()
    with Alive(computes) as alive, patch.object(torch.nn.functional, "dropout", _dropout):
        loaded = meta_base(shapes_file(config.model))
        base = loaded.model.to(getattr(torch, config.model.dtype)).to_empty(device="cpu")
        base.set_attn_implementation(config.model.attention)
        for tensor in (*base.parameters(), *base.buffers()):
            tensor.fill_(0.01) if tensor.is_floating_point() else tensor.copy_(numbered(tensor))
        trained = TrainedModel(attach_adapter(base, method.adapter(loaded)), method, samples).train()
        parameters = [p for p in trained.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer = torch.optim.AdamW(parameters, fused=True)
        optimizer.step()
        state = alive.now
        inputs = {
            k: v.to(base.dtype) if v.is_floating_point() else v for k, v in batch(config, loaded, samples, tokens)
        }

        def step() -> None:
            trained(**inputs)["loss"].backward()
            optimizer.step()

        for recompute in (False, True):
            if recompute:
                enable_checkpointing(trained.model)
            before = alive.most = alive.now
            step()
            found.append(Step(state, alive.most - before))
    return found[0], found[1]


def numbered(tensor: Tensor) -> Tensor:
    """What a buffer of positions would hold."""
    return torch.arange(tensor.numel()).reshape(tensor.shape)


def batch(config: Config, loaded: LoadedBase, samples: int, tokens: int) -> Iterable[tuple[str, Tensor]]:
    """Inputs of a training step: an image each, of ``SIZE`` where that matters; the first record is a bit shorter."""
    if loaded.family.vicuna:
        shapes = loaded.model.config
        word, start = 5, torch.tensor([5, 5, *[shapes.image_token_index] * loaded.image_token_count])
        side = shapes.vision_config.image_size
        extra = {"pixel_values": torch.randn(1, 3, side, side)}
    else:
        chat = open_encoder(config.model, offline=True).chat
        assert chat is not None
        item = chat.prompt_item("What is it?", Image.new("RGB", SIZE))
        word, start, extra = int(item.input_ids[-1]), item.input_ids, item.extra
    items = []
    for row in range(samples):
        ids = torch.cat([start, start.new_full((tokens - len(start) - 3 * (row == 0),), word)])
        labels = torch.full_like(ids, IGNORE)
        labels[-ANSWERS - 4 : -4] = 7
        types = {k: torch.cat([v, v.new_zeros(len(ids) - len(v))]) for k, v in extra.items() if k.endswith(TOKEN_TYPES)}
        items.append(TrainItem(ids, None, labels, extra=extra | types))
    return (collate_train(items, 0) | {"num_items_in_batch": torch.tensor(16)}).items()


def _dropout(x: Tensor, p: float, training: bool, inplace: bool = False) -> Tensor:
    """Dropout with a mask of bytes, as on a GPU; a CPU's has the type of ``x``."""
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


def memory(model: str, layers: list[int], names: list[str], samples: int, tokens: int) -> None:
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
                plain, again = measured(config, samples, tokens, computes=False)
            gc.collect()
            rows[number] = [plain.state, plain.peak, again.peak]
            show(model, number, name, parts, rows[number], figures)
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
    """Write a base with random weights and a benchmark of two tasks, each two records about one image."""
    base = random_base(cut(model, layers))
    tokenizer = LlamaTokenizer(*llama_pieces(), add_bos_token=True, extra_special_tokens={"image_token": "<image>"})
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    base.model.config.image_token_index, base.model.config.text_config.pad_token_id = 32000, 32001
    assert (tokenizer.image_token_id, tokenizer.pad_token_id) == (32000, 32001), "as in llava-hf's folders"
    base.model.save_pretrained(folder / "base")
    how = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(image_processor=base.image_processor, tokenizer=tokenizer, **how)
    processor.save_pretrained(folder / "base")
    tasks = []
    for name, image in zip(("first", "second"), write_images(folder / "images", 2, 336), strict=True):
        asked = records([image])[:2]
        turns = [(f"<image>\n{record.turns[0].question}", record.turns[0].answer) for record in asked]
        rows = [
            {
                "id": record.id,
                "image": image,
                "conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}],
            }
            for record, (q, a) in zip(asked, turns, strict=True)
        ]
        tests = [
            {"question_id": record.id, "image": image, "text": question, "answer": "red"}
            for record, question in zip(asked, QUESTIONS, strict=False)
        ]
        files = {"train": f"{name}-train.json", "test": f"{name}-test.json", "images": "images"}
        (folder / files["train"]).write_text(json.dumps(rows))
        (folder / files["test"]).write_text(json.dumps(tests))
        tasks.append({"name": name, "max_new_tokens": 2, "scorer": "short_answer", **files})
    benchmark = {"name": "rehearsal", "root": str(folder.resolve()), "tasks": tasks}
    (folder / "benchmark.yaml").write_text(yaml.safe_dump(benchmark, sort_keys=False))


class Widened(TorchDispatchMode):
    """Large bfloat16 products in float32, each sum rounded once, as a tensor core does.

    A CPU without bfloat16 instructions takes five times as long for them.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket not in FLAT_PRODUCTS:
            return func(*args, **(kwargs or {}))
        *added, a, b = args
        if a.dtype != torch.bfloat16 or 2 * a.shape[0] * b.numel() < 1e9:
            return func(*args, **(kwargs or {}))
        in_place, factor = func.overloadpacket is torch.ops.aten.addmm_, {"beta": 1, "alpha": 1} | (kwargs or {})
        result = args[0] if in_place else a.new_empty(a.shape[0], b.shape[1])
        wide = a.float()
        for part in torch.arange(b.shape[1]).split(1024):  # so that a piece of the weight stays small
            columns = slice(int(part[0]), int(part[-1]) + 1)
            product = wide @ b[:, columns].float()
            for other in added:
                product = factor["beta"] * other[..., columns] + factor["alpha"] * product
            result[:, columns] = product
        return result


def alone(figures: Path, arguments: list[str]) -> None:
    """Run ``clmoe`` with these arguments; note CPU seconds, and tokens, seconds and memory of each phase's steps."""
    steps, peak, train, forward = [], Peak(), TaskTrainer.train, TrainedModel.forward

    def watched(trainer: TaskTrainer) -> None:
        sizes, before = [], [*trainer.model.parameters(), *trainer.model.buffers()]

        def counted(self: TrainedModel, *given: Any, **inputs: Any) -> Any:
            sizes.append((inputs["input_ids"].numel(), int((inputs["labels"] >= 0).sum())))
            return forward(self, *given, **inputs)

        with patch.object(TrainedModel, "forward", counted), Alive(computes=True) as alive:
            alive.seen.update(tensor.untyped_storage()._cdata for tensor in before)  # views of these are not new
            seconds, _ = timed(lambda: train(trainer))
        tokens, answers = map(sum, zip(*sizes, strict=True))
        row = {"tokens": tokens, "answers": answers, "records": len(sizes), "seconds": seconds}
        steps.append(row | {"held": sum(tensor.nbytes for tensor in before) + alive.most})

    with Widened(), patch.object(TaskTrainer, "train", watched), patch.object(time, "monotonic", time.process_time):
        clmoe(arguments)
    values = {"steps": steps, "peak": peak.mib(), "seconds": time.process_time()}
    figures.write_text(json.dumps(values))


def run(folder: Path, out: Path, names: list[str], checkpointing: list[str], dtype: str) -> None:
    """Print a row for each ``clmoe run``; what was finished before is not run again."""
    os.environ["CLMOE_FEATURES"] = str(out / "features")
    out.mkdir(parents=True, exist_ok=True)
    print(f"| {' | '.join(COLUMNS)} |\n|---|---|---|{'---:|' * (len(COLUMNS) - 4)}---|")
    adapters: dict[str, str] = {}
    for state, name in itertools.product(checkpointing, names):
        target, killed = out / f"{name}-{dtype}-{state}", state == "on" and name == KILLED
        settings = [f"model.dtype={dtype}", f"training.gradient_checkpointing={json.dumps(state == 'on')}"]
        settings += ["training.batch_size=1", "training.save_steps=1", "training.steps=2"]
        settings += ["evaluation.batch_size=2", "evaluation.exact=false"]
        if name == "llava_cmoe":
            settings += ["options.extend=every", "options.probe_min_steps=1", "locator.options.steps=10"]
        figures = target.with_suffix(".json")
        where = [str(folder / "benchmark.yaml"), "--base", str(folder / "base"), "--output", str(target)]
        if not figures.exists():
            shutil.rmtree(target, ignore_errors=True)
            for kill in (True, False) if killed else (False,):
                start(figures, ["run", name, *where, *settings], target if kill else None)
        (sealed,) = target.glob("02_*/adapter_model.safetensors")
        adapter = file_sha256(sealed)
        same = "" if name not in adapters else "same bytes" if adapter == adapters[name] else "differs"
        adapters.setdefault(name, adapter)
        _, config, _ = chosen(name, where[0], settings, order="norm", base=where[2], data=None)
        cells = numbers(config, read_json(figures), target)
        row = [folder.name, f"`{name}`", f"{state}, killed once" if killed else state, *cells, same]
        print(f"| {' | '.join(row)} |", flush=True)


def numbers(config: Config, noted: dict[str, Any], target: Path) -> list[str]:
    """The numbers of a row: CPU seconds of the parts, then speed and memory of the first task's steps."""
    spent = dict.fromkeys(("trained", "ended", "located", "evaluated"), 0.0)
    for event in read_events(target / "events.jsonl"):
        if event["event"] in spent:
            spent[event["event"]] += event["seconds"]
    step, first, again = (
        noted["steps"][0],
        first_task(method_class(config.method)(config)),
        config.training.gradient_checkpointing,
    )
    tokens = step["tokens"] // step["records"]
    plan = (sum(state_bytes(first).values()) + activation_bytes(first, 1, tokens, again)) / GIB
    adapter, tuned = first.count("expert") + first.count("router"), first.count("projector") > 0
    sizes = first.shapes, first.image
    work = step_flops(*sizes, step["records"], tokens, step["answers"], adapter, tuned, again)
    cells = [f"{seconds:.0f}" for seconds in (*spent.values(), noted["seconds"])]
    cells += [f"{1e3 * step['seconds'] / step['tokens']:.1f}", f"{work / step['tokens'] / 1e9:.2f}"]
    cells += [f"{work / step['seconds'] / 1e9:.0f}"]
    held = step["held"] / GIB
    return [*cells, f"{held:.2f}", f"{plan:.2f}", f"{held / plan:.3f}", f"{noted['peak'] / 1024:.2f}"]


def start(figures: Path, arguments: list[str], kill_in: Path | None) -> None:
    """``alone`` in a process of its own; it is killed once ``kill_in`` holds a saved state."""
    log = figures.with_suffix(".log")
    with log.open("a") as stream:
        line = [sys.executable, "-W", "ignore", __file__, "alone", str(figures), *arguments]
        process = subprocess.Popen(line, stdout=stream, stderr=stream)
    while process.poll() is None:
        if kill_in is not None and [*kill_in.glob(f".*/{PHASES}/trained.step-*/{MANIFEST}")]:
            process.kill()
        time.sleep(0.1)
    if process.returncode != (0 if kill_in is None else -signal.SIGKILL):
        sys.exit(f"rehearse: clmoe {' '.join(arguments)} ended with {process.returncode}: {log}")


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
    verbs.add_parser("structure")
    args = parser.parse_args()
    if args.verb == "structure":
        structure()
    elif args.verb == "make":
        make(args.folder, args.model, args.layers)
    elif args.verb == "run":
        run(args.folder, args.out, args.methods, args.checkpointing, args.dtype)
    else:
        memory(args.model, args.layers, args.methods, 1, 640)


if __name__ == "__main__":
    if sys.argv[1:2] == ["alone"]:  # what `run` starts
        alone(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
