"""What the GPU kit measures, one function per part; `kit.py` starts them and holds the table of their figures."""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import experts
import torch
import torch.distributed as dist
from clock import DEVICE, Peak, device_name, peak_rate, timed
from eval import measure as measure_answers
from five_questions import QUESTIONS, TRUE_SIZE, adapted, questions, random_base, records, write_images
from kit import FORMS, METHODS, RANKS, Record
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clmoe.bases.inputs import to_device, train_dataset
from clmoe.bases.llava import LoadedBase, decoder_layers, shapes_file
from clmoe.config import Config, load_config
from clmoe.data.batches import collate_train
from clmoe.data.prompts import IGNORE
from clmoe.evaluate.answer import Answerer
from clmoe.experts.forward import FeatureStore, adapted_base, enable_checkpointing
from clmoe.experts.layer import expert_layers, experts_by_linear
from clmoe.experts.model import add_routers, detach_adapter
from clmoe.experts.routing import NEWEST_ROUTER, checkpoint_contexts, routing
from clmoe.locators import make_locator
from clmoe.locators.base import Asked
from clmoe.methods import method_class
from clmoe.plan import activation_bytes, first_task, state_bytes
from clmoe.plan.cost import step_flops
from clmoe.train.loop import TrainedModel, parameter_groups
from clmoe.utils.files import read_json
from clmoe.utils.processes import mean_of_each

__all__ = ["PARTS", "Sizes", "device_name"]
GIB = 2**30
FORM = ("frozen", "packed", "again", "loop", "peft", "peft_16")
COMPILED = ("frozen", "packed", "peft_16")


@dataclass(frozen=True)
class Sizes:
    """The true sizes: LLaVA-1.5-7B, and what keeps an 80 GB card busy for seconds."""

    shapes: dict[str, Any] = field(default_factory=lambda: read_json(shapes_file(TRUE_SIZE)))
    ffn_tokens: int = 10240
    repeats: int = 10
    backend: str = "inductor"
    batch: int = 8
    steps: int = 3
    images: int = 6
    new_tokens: int = 8
    micro_batches: tuple[int, ...] = (1, 2, 4, 8)
    soak_steps: int = 200
    fit_steps: int = 2000

    @classmethod
    def smoke(cls) -> Sizes:
        """Sizes that take seconds on a CPU."""
        shapes = read_json(shapes_file(TRUE_SIZE)) | {"image_seq_length": 4}
        text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 832}
        heads = {"num_attention_heads": 2}
        vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "image_size": 28}
        shapes["text_config"] |= text | heads | {"num_key_value_heads": 2}
        shapes["vision_config"] |= vision | heads
        return cls(shapes, 64, 2, "aot_eager", 4, 1, 1, 2, (1, 2), 20, 5)

    @property
    def base(self) -> LoadedBase:
        return random_base(self.shapes)

    def config(self, method: str, folder: Path, *overrides: str) -> Config:
        """A method's configuration, for a model folder that holds these shapes."""
        (folder / "config.json").write_text(json.dumps(self.shapes))
        return load_config(method, {}, ["model.dtype=bfloat16", *overrides], str(folder))


# ---- (a), (c): one FFN


def _problem(size: Sizes, rank: int) -> experts.Problem:
    text = size.shapes["text_config"]
    return experts.build(size.ffn_tokens, rank, 8, text["hidden_size"], text["intermediate_size"], torch.bfloat16)


def ffn(record: Record, size: Sizes) -> None:
    """Forward and backward of one FFN in every form, eager; then compiled."""
    for rank in RANKS:
        problem = _problem(size, rank)
        steps = {name: partial(problem.step, getattr(problem, name)) for name in FORM}
        times = experts.seconds(steps, size.repeats)
        ratios = {f"{name}_over_frozen": times[name] / times["frozen"] for name in FORM[1:]}
        own = {name: times[name] - times["frozen"] for name in FORM}
        times_ms = {f"{name}_ms": 1e3 * value for name, value in times.items()}
        record.add(f"r{rank}_", **times_ms, **ratios, adapter_loop_over_packed=own["loop"] / own["packed"])
    reference: float | None = None  # the frozen FFN is the same at every rank
    for rank in RANKS:
        names = COMPILED if reference is None else ("packed",)
        with record.trying(*(f"r{rank}_{name}_compiled_over_frozen" for name in names if name != "frozen")):
            problem = _problem(size, rank)
            forms = {name: torch.compile(problem.forward, backend=size.backend, dynamic=False) for name in names}
            steps = {name: partial(problem.step, getattr(problem, name), form) for name, form in forms.items()}
            times = experts.seconds(steps, size.repeats)
            reference = reference or times["frozen"]
            record.add(f"r{rank}_", **{f"{name}_compiled_over_frozen": times[name] / reference for name in names})


def kept_activations(record: Record, size: Sizes) -> None:
    """MB (1e6 bytes) that each form keeps for the backward pass beyond the frozen FFN; peaks where there is a GPU."""
    for rank in RANKS:
        problem = _problem(size, rank)
        kept = {name: experts.saved_bytes(problem, getattr(problem, name)) for name in FORM}
        more = {f"{name}_mb": (kept[name] - kept["frozen"]) / 1e6 for name in FORM[1:]}
        record.add(f"r{rank}_", **more, loop_over_again=more["loop_mb"] / more["again_mb"])
        if DEVICE.type == "cuda":
            steps = {name: partial(problem.step, getattr(problem, name)) for name in FORM}
            record.add(f"r{rank}_", **{f"{n}_peak_mb": experts.peak_bytes(step) / 1e6 for n, step in steps.items()})


# ---- (b), (f), (g): training


def recompute(model: PeftModel) -> None:
    """Activation checkpointing as in a training; transformers below 5.20 has another name for it."""
    base = adapted_base(model)
    if hasattr(base, "activation_checkpointing_enable"):
        enable_checkpointing(model)
    else:
        how = {"use_reentrant": False, "context_fn": checkpoint_contexts}
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)


class Training:
    """A method's first task on a base: one batch after the other."""

    def __init__(self, base: LoadedBase, config: Config) -> None:
        self.base, self.config = base, config
        self.model, method = adapted(base, config)
        recompute(self.model)
        self.trained = TrainedModel(self.model, method, 1).train()
        rates = (config.training.learning_rate, config.training.projector_learning_rate)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.trained, *rates), weight_decay=0.0)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

    def step(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """(loss, norm of the gradient), neither waited for."""
        self.trained.batch_size = len(batch["input_ids"])
        loss = self.trained(**batch, num_items_in_batch=(batch["labels"] != IGNORE).sum())["loss"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.training.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach(), norm

    def end(self) -> None:
        """Take the adapter off the base again."""
        detach_adapter(self.model)
        self.optimizer.state.clear()
        self.trained = self.optimizer = self.parameters = self.model = None  # type: ignore[assignment]
        gc.collect()
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()


def batches(base: LoadedBase, folder: Path, samples: int, count: int = 1) -> list[dict[str, Tensor]]:
    """Batches of ``samples`` records with images, some 640 tokens each at LLaVA's size."""
    side = base.model.config.vision_config.image_size
    rows = records(write_images(folder, -(-samples * count // len(QUESTIONS)), side))
    dataset = train_dataset(base, rows, folder, 2048)
    cut = [dataset.__getitems__(range(k * samples, (k + 1) * samples)) for k in range(count)]
    return [to_device(collate_train(items, base.tokenizer.pad_token_id), base) for items in cut]


def methods(record: Record, size: Sizes, folder: Path) -> None:
    """A step of each method, with checkpointing; peak memory against the plan's."""
    base = size.base
    (batch,) = batches(base, folder, size.batch)
    samples, tokens = batch["input_ids"].shape
    answers, peak = int((batch["labels"] != IGNORE).sum()), peak_rate(torch.bfloat16)
    record.add(samples=samples, tokens=tokens, peak_tflops=peak / 1e12)
    for name in METHODS:
        keys = [f"{name}_{kind}" for kind in ("step_s", "tokens_per_s", "mfu_percent", "peak_gib", "planned_gib")]
        with record.trying(*keys):
            config = size.config(name, folder)
            first = first_task(method_class(config.method)(config))
            planned = sum(state_bytes(first).values()) + activation_bytes(first, samples, tokens, True)
            training = Training(base, config)
            training.step(batch)
            most = Peak()
            times = [timed(partial(training.step, batch))[0] for _ in range(size.steps)]
            seconds, adapter = median(times), first.count("expert") + first.count("router")
            tuned = first.count("projector") > 0
            work = step_flops(first.shapes, first.image, samples, tokens, answers, adapter, tuned)
            record.add(
                f"{name}_",
                step_s=seconds,
                tokens_per_s=samples * tokens / seconds,
                mfu_percent=100 * work / seconds / peak,
                peak_gib=most.mib() / 1024,
                planned_gib=planned / GIB,
            )
            training.end()


def four_bit(base: LoadedBase) -> None:
    """Store the blocks' linears in NF4, as `model.load_in_4bit` does from files."""
    import bitsandbytes as bnb

    for layer in decoder_layers(base.model):
        for name, linear in list(layer.named_modules()):
            if isinstance(linear, nn.Linear):
                shape = (linear.in_features, linear.out_features)
                small = bnb.nn.Linear4bit(
                    *shape, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4",
                    device="meta",
                )  # fmt: skip
                weight = linear.weight.data.cpu()
                kind = {"requires_grad": False, "compress_statistics": True, "quant_type": "nf4"}
                small.weight = bnb.nn.Params4bit(weight, **kind).to(DEVICE)
                layer.set_submodule(name, small)


def on_24_gib(record: Record, size: Sizes, folder: Path) -> None:
    """CL-MoE's step if the allocator may take 24 GiB: the largest micro-batch, in bfloat16 and in 4 bits."""
    if DEVICE.type == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * GIB / total))
    base = size.base
    _largest(record, "bf16", size, base, folder)
    keys = ["nf4_batch", "nf4_gib", "nf4_state_gib"]
    if find_spec("bitsandbytes") is None or DEVICE.type == "cpu":
        record.skip(keys, "skipped: needs a GPU and the package bitsandbytes")
        return
    with record.trying(*keys):
        four_bit(base)
        gc.collect()
        torch.cuda.empty_cache()
        record.add(nf4_state_gib=torch.cuda.memory_allocated() / GIB)
        _largest(record, "nf4", size, base, folder)


def _largest(record: Record, name: str, size: Sizes, base: LoadedBase, folder: Path) -> None:
    with record.trying(f"{name}_batch", f"{name}_gib"):
        training = Training(base, size.config("clmoe", folder))
        for samples in size.micro_batches:
            (batch,) = batches(base, folder, samples)
            peak = Peak()
            try:
                for _ in range(2):
                    training.step(batch)
            except torch.OutOfMemoryError:
                break
            record.add(f"{name}_", batch=samples, gib=peak.mib() / 1024)
        training.end()


def soak(record: Record, size: Sizes, folder: Path) -> None:
    """CL-MoE in bfloat16 for many steps of two records: is everything finite, and memory flat?"""
    base = size.base
    training = Training(base, size.config("clmoe", folder))
    given, seen = batches(base, folder, 2, 20), []
    peak = Peak()
    for number in range(size.soak_steps):
        seen.append(torch.stack(training.step(given[number % len(given)])).float())
        if number % 10 == 9:
            values = torch.stack(seen)
            bad = int((~values.isfinite()).sum()) + sum(int((~p.isfinite()).sum()) for p in training.parameters)
            early = {"early_gib": peak.mib() / 1024} if number == 9 else {}
            record.add(steps=number + 1, nonfinite=bad, norm=float(values[:, 1].max()), **early)
            record.add(first_loss=values[:10, 0].mean(), last_loss=values[-10:, 0].mean(), late_gib=peak.mib() / 1024)


# ---- (d), (e), (h): answering; (h) also checks several GPUs' gradients


def answers(record: Record, size: Sizes, folder: Path) -> None:
    """Five questions per image, alone and in batches; random weights make close calls, which exact mode repeats."""
    asked = argparse.Namespace(images=size.images, batch=32, new_tokens=size.new_tokens, uncounted=True)
    found = measure_answers(asked, folder, size.base)
    count = found.pop("questions")
    record.add(questions=count, one_by_one_per_s=count / found.pop("one by one")["seconds"])
    for name, key in ((form, key) for key, form in FORMS.items()):
        values = found[name]
        record.add(f"{key}_", per_s=count / values["seconds"], times=values["times_faster"], redone=values["redone"])


def location(record: Record, size: Sizes, folder: Path, tasks: int = 8) -> None:
    """What LLaVA-CMoE's VAEs add to answering: the features' pass on the frozen base, and the scores."""
    base = size.base
    config = size.config("llava_cmoe", folder, "locator.options.steps=5", "evaluation.exact=false")
    model, method = adapted(base, config)
    for owner in range(1, tasks):
        weights = {n: torch.randn_like(layer.routers.instance[0].weight) for n, layer in expert_layers(model).items()}
        add_routers(model, owner, {name: 0.02 * weight for name, weight in weights.items()})
    for linear in experts_by_linear(model).values():
        linear.freeze_as(base.dtype)
    asked = questions(write_images(folder, size.images, base.model.config.vision_config.image_size))
    answerer = Answerer(base, model, method, tasks, None)
    locator = answerer.own = make_locator(config.locator, 0)
    width = size.shapes["text_config"]["hidden_size"]
    for _ in range(tasks):
        locator.fit(torch.randn(500, width))
    features = torch.randn(len(asked), width)
    scored = Asked([question.question_id for question in asked], tasks, features)

    def known() -> object:
        return answerer.answer(asked, folder, size.new_tokens, "oracle", 0)

    def located() -> object:
        return answerer.answer(asked, folder, size.new_tokens)

    known()
    located()
    seconds = {"known_s": timed(known)[0], "located_s": timed(located)[0]}
    answerer.store = FeatureStore.of(base, config, folder / "features", locator.view)
    located()
    seconds |= {"kept_s": timed(located)[0], "scores_s": timed(lambda: locator.scores(scored))[0]}
    ratios = {f"{kind}_over_known": seconds[f"{kind}_s"] / seconds["known_s"] for kind in ("located", "kept")}
    record.add(**seconds, **ratios)
    whole = make_locator(size.config("llava_cmoe", folder, f"locator.options.steps={size.fit_steps}").locator, 0)
    record.add(fit_s=timed(lambda: whole.fit(torch.randn(500, width)))[0])


@torch.no_grad()
def attention(record: Record, size: Sizes, folder: Path) -> None:
    """Logits of the last token by each kernel of attention, against transformers' eager one."""
    base = size.base
    (batch,) = batches(base, folder, 4)
    inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}

    @contextlib.contextmanager
    def kernel(name: str, backend: SDPBackend | None = None) -> Iterator[None]:
        base.model.set_attn_implementation({"text_config": name})
        with contextlib.nullcontext() if backend is None else sdpa_kernel(backend), routing(NEWEST_ROUTER):
            yield

    def logits() -> Tensor:
        return base.model(**inputs, use_cache=False, logits_to_keep=1).logits.float()

    def measured() -> tuple[float, Tensor]:
        found = [timed(logits) for _ in range(size.steps + 1)][1:]
        return median(seconds for seconds, _ in found), found[-1][1]

    with kernel("eager"):
        slow, expected = measured()
    record.add(eager_s=slow)
    forms = {"sdpa": ("sdpa", None), "kernel": ("sdpa", SDPBackend.FLASH_ATTENTION)}
    for key, (name, backend) in (forms | {"package": ("flash_attention_2", None)}).items():
        if key == "package" and (find_spec("flash_attn") is None or DEVICE.type == "cpu"):
            record.skip([key, f"{key}_times"], "skipped: needs a GPU and the package flash-attn")
            continue
        with record.trying(key, f"{key}_times"), kernel(name, backend):
            seconds, got = measured()
            record.add(**{key: (got - expected).norm() / expected.norm(), f"{key}_times": slow / seconds})


def attention_and_hook(record: Record, size: Sizes, folder: Path) -> None:
    attention(record, size, folder)
    gradients_hook(record, folder)


def gradients_hook(record: Record, folder: Path) -> None:
    """How long the main stream waits for DDP's mean of gradients behind a delayed stream, over the delay."""
    if DEVICE.type == "cpu":
        record.skip(["hook_wait"], "skipped: needs a GPU")
        return
    gradient, side = torch.ones(4, device=DEVICE), torch.cuda.Stream()
    bucket: Any = SimpleNamespace(buffer=lambda: gradient, gradients=lambda: [gradient[:2], gradient[2:]])

    def delayed() -> None:
        with torch.cuda.stream(side):
            torch.cuda._sleep(10**9)
            future = mean_of_each(None, bucket)
        future.wait()

    with record.trying("hook_wait"):
        dist.init_process_group("nccl", init_method=f"file://{folder}/group", rank=0, world_size=1)
        mean_of_each(None, bucket).wait()  # NCCL's start
        delay = timed(lambda: torch.cuda._sleep(10**9))[0]
        record.add(hook_wait=timed(delayed)[0] / delay)
        dist.destroy_process_group()


def in_folder(work: Callable[[Record, Sizes, Path], None]) -> Callable[[Record, Sizes], None]:
    """Give the part a folder for its pictures, which is removed."""

    def part(record: Record, size: Sizes) -> None:
        with TemporaryDirectory() as folder:
            work(record, size, Path(folder))

    return part


PARTS: dict[str, Callable[[Record, Sizes], None]] = {
    "a": ffn,
    "b": in_folder(methods),
    "c": kept_activations,
    "d": in_folder(answers),
    "e": in_folder(location),
    "f": in_folder(on_24_gib),
    "g": in_folder(soak),
    "h": in_folder(attention_and_hook),
}
