"""What a sequence trains and needs, before it runs: parameters, steps, missing files, memory of a GPU, its cost."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from textwrap import wrap
from typing import Any, TypeVar, cast

import torch
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from clmoe.bases.inputs import WORTHWHILE
from clmoe.bases.llava import LoadedBase, decoder_layers, meta_base, shapes_file
from clmoe.benchmarks.base import Benchmark, Task
from clmoe.config import FFN_PROJECTIONS, Config
from clmoe.data.records import count_records
from clmoe.errors import ClmoeError
from clmoe.experts.config import ExpertConfig
from clmoe.experts.layer import expert_layers, experts_by_linear
from clmoe.methods import method_class
from clmoe.methods.base import Method, attach_on_meta
from clmoe.plan.cost import MFU, Card, answer_flops, downloads, questions_asked, step_flops
from clmoe.plan.shapes import ImageSize, Shapes, image_size, shapes_of
from clmoe.train.loop import BatchPlan, total_steps
from clmoe.utils.files import read_json
from clmoe.utils.paths import find_config, resolve_model_path
from clmoe.utils.tensors import trainable

T = TypeVar("T")
TEXT_TOKENS, ANSWER_TOKENS = 64, 16  # of a sample, for the memory figure
LONG_TEXT = 256  # the same where a card must hold every sample, long ones too
FLOAT32 = 4
FOUR_BIT = 0.5 + (1 + FLOAT32 / 256) / 64  # bytes of an nf4 weight: a maximum for 64 of them, and for 256 maxima
REDUCE_BUCKET = 5e8  # elements, DeepSpeed's default
EIGHT_BIT = 1  # and a float32 scale for each output
USABLE = 0.9  # of a card's memory: the rest is for what no figure counts, CUDA's context and fragmentation
PARTS = {
    "expert": ("clmoe_experts.", "lora_"), "router": ("clmoe_routers.",), "prompt": ("clmoe_prompts.",),
    "projector": ("modules_to_save.",),
}  # fmt: skip


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear ``din -> dout`` of ``blocks`` decoder blocks, with experts ``A [E*r, din]``, ``B [dout, E*r]``."""

    name: str
    din: int
    dout: int
    experts: int
    rank: int
    blocks: int = 1

    @property
    def parameters(self) -> int:
        return self.blocks * self.experts * self.rank * (self.din + self.dout)


@dataclass(frozen=True)
class FirstTask:
    """A meta model with the adapter of a method's first task; ``file`` is the config.json that it was built from.

    Images are those of ``tasks``.
    """

    method: Method
    file: Path
    base: LoadedBase
    model: PeftModel
    shapes: Shapes
    base_parameters: int
    base_bytes: int
    tasks: Sequence[Task] = ()

    @cached_property
    def image(self) -> ImageSize:
        """What an image of its tasks takes. Raises ClmoeError as ``image_size`` does."""
        return image_size(self.method.config.model, self.base, self.tasks)

    def tokens(self, text: int, whole: int | None = None) -> int:
        """Tokens of a sample with an image and ``text`` tokens (or with ``whole`` in all), and places of soft prompts.

        The places add to ``training.max_length``; there are as many as in the last task.
        """
        limit, soft = self.method.config.training.max_length, self.method.soft_tokens(len(self.tasks))
        return min(whole or self.image.tokens + text, limit) + soft

    @cached_property
    def experts(self) -> ExpertConfig | None:
        """None for plain LoRA."""
        config = self.model.peft_config[self.model.active_adapter]
        return config if isinstance(config, ExpertConfig) else None

    @cached_property
    def linears(self) -> list[AdaptedLinear]:
        """What is adapted; equal linears of different blocks are one entry."""
        found = [(n, e.din, e.dout, e.count, e.rank) for n, e in experts_by_linear(self.model).items()]
        for name, layer in self.model.named_modules():
            if isinstance(layer, LoraLayer):
                linear = cast(nn.Linear, layer.get_base_layer())
                found.append((name, linear.in_features, linear.out_features, 1, layer.r[self.model.active_adapter]))
        counts = Counter(AdaptedLinear(name.rpartition(".")[2], *sizes) for name, *sizes in found)
        return [replace(linear, blocks=count) for linear, count in counts.items()]

    def count(self, part: str | None = None, *, kept: bool = False) -> int:
        """Parameters that train, or all that are ``kept``, frozen or not; of the adapter or one of ``PARTS``."""
        marks = ("",) if part is None else PARTS[part]
        trained = {name: p for name, p in trainable(self.model).items() if kept or self.method.rate_factor(name)}
        return sum(p.numel() for name, p in trained.items() if any(mark in name for mark in marks))


def first_task(method: Method, tasks: Sequence[Task] = ()) -> FirstTask:
    """Attach the adapter of the method's first task to a meta model. Raises ClmoeError as ``meta_base`` does."""
    config = method.config.model
    file = shapes_file(config)
    base = meta_base(file)
    shapes = shapes_of(base)
    model = base.model.to(getattr(torch, config.dtype))
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if config.load_in_4bit or config.load_in_8bit:
        bits = FOUR_BIT if config.load_in_4bit else EIGHT_BIT
        linears = [module for module in decoder_layers(model).modules() if isinstance(module, nn.Linear)]
        size += round(sum(bits * linear.weight.numel() - linear.weight.nbytes for linear in linears))
        size += 0 if config.load_in_4bit else sum(FLOAT32 * linear.out_features for linear in linears)
    parameters = sum(p.numel() for p in model.parameters())
    return FirstTask(method, file, base, attach_on_meta(method, base), shapes, parameters, size, tasks)


def by_task(first: FirstTask, tasks: int, X: float | None) -> tuple[list[int | None], int | None, dict[str, int]]:
    """What each task trains; what the sequence keeps; and the sizes by which one block grows, empty without growth.

    A later task of a growing method trains the experts that it adds to ``X`` blocks on average, and in every block a
    router: a copy of the newest with one more row for each new expert. Without ``X`` these counts are None.
    """
    whole = first.count()
    if not first.method.grows or first.experts is None:
        added_up = first.experts is not None and not first.experts.router_owners  # O-LoRA: an expert for each task
        stored, expert = first.count(kept=True), first.count("expert", kept=True)
        frozen = (".guide.key", ".prompt")  # an expert, a key, or soft tokens and their prototype are kept of each task
        keys = sum(p.numel() for name, p in trainable(first.model).items() if name.endswith(frozen))
        keys += (first.experts.prompts or {}).get("width", 0) if first.experts is not None else 0
        more = stored if first.method.chain == "fresh" else expert + keys if added_up else 0
        shared = expert * first.method.shared_rank // first.method.config.adapter.rank if tasks > 1 else 0
        return [whole] * tasks, stored + (tasks - 1) * more + shared, {}
    layers = list(expert_layers(first.model).values())  # blocks start alike, so one stands for all
    if X is not None and not 0 <= X <= len(layers):
        raise ClmoeError(f"--extended-blocks {X:g}: the model has {len(layers)} blocks")
    expert = sum(e.rank * (e.din + e.dout) for e in layers[0].experts.values())
    router, row = (cast(Tensor, layers[0].routers.instance[0].weight)[:k].numel() for k in (None, 1))
    warm_up = -min(map(min, first.experts.layout.values()))  # 1 where the initial experts precede the first task
    growing = range(1, tasks + warm_up)
    later = [None if X is None else round(X * (expert + n * row) + len(layers) * router) for n in growing]
    kept = None if None in later else sum([whole, *cast(list[int], later)])
    return [whole, *later][warm_up:], kept, {"expert": expert, "router": router, "router_row": row}


def state_bytes(first: FirstTask, gpus: int = 1, deepspeed: str | None = None) -> dict[str, int]:
    """What a GPU holds through the whole training; trained parameters are float32. DeepSpeed need not be installed.

    AdamW keeps two moments, and DDP a copy of the gradients. ZeRO shards moments and float32 masters over the GPUs, and
    from stage 2 the gradients too; offloading moves all three to the host.
    """
    settings = {} if deepspeed is None else read_json(find_config("deepspeed", deepspeed, ".json"))
    zero = settings.get("zero_optimization", {})
    P, stage, base = FLOAT32 * first.count(), zero.get("stage", 0), first.base_bytes
    adapter = FLOAT32 * first.count(kept=True)
    if stage == 0:
        return {"base": base, "adapter": adapter, "gradients": P, "optimizer": 2 * P, "communication": P * (gpus > 1)}
    here = int(zero.get("offload_optimizer", {}).get("device", "none") == "none")
    bucket = zero.get("reduce_bucket_size")
    elements = int(bucket if isinstance(bucket, int | float) else REDUCE_BUCKET)
    return {
        "base": base,
        "adapter": adapter,
        "gradients": here * P // (gpus if stage == 2 else 1),
        "optimizer": here * 3 * P // gpus,
        "communication": FLOAT32 * elements * (2 if zero.get("overlap_comm") else 1),
    }


def activation_bytes(first: FirstTask, samples: int, tokens: int, recompute: bool) -> int:
    """The most that the passes of a micro-batch hold besides weights and gradients; each sample has an image.

    ``b`` is the bytes of the base's type, ``N`` the tokens. The peak is in the loss, or in the backward pass of the
    last norm or the last block; ``20 D`` and the factors of ``F`` are measured.
    """
    s, adapter, model = first.shapes, first.method.config.adapter, first.method.config.model
    b, N, D, F, L = first.base.dtype.itemsize, samples * tokens, s.D, s.F, s.L
    lora, half = first.experts is None, b < FLOAT32
    per_block = not lora and adapter.router_scope == "per_block"
    names, own = {x.name for x in first.linears}, FLOAT32 if lora else b
    adapted = sum(own * x.experts * x.rank for x in first.linears)  # per token: what lies between A and B, then inputs
    if adapter.dropout or (lora and half):  # a copy for every linear, and dropout's mask
        copies = adapter.experts if adapter.as_released and not lora else 1
        adapted += sum(copies * x.din * (own + (adapter.dropout > 0)) for x in first.linears)
    if not lora or not (adapter.dropout or half):  # once if linears or routers read the same
        adapted += b * D * (bool(names & {"q_proj", "k_proj", "v_proj"}) + bool(names & {"gate_proj", "up_proj"}))
        adapted += b * F * ("down_proj" in names and not per_block)
    cast_experts = 0 if lora or not half else sum(b * x.parameters // x.blocks for x in first.linears)
    attention = N * (FLOAT32 * s.norms + 2 * b * (s.queries + (s.queries if s.masked else s.keys)))
    attention += N * tokens * b * s.masked
    block = attention + N * (3 * b * F + adapted) + cast_experts
    tuned = first.count("projector") > 0
    first_trains = tuned or first.count("prompt") or not names <= set(FFN_PROJECTIONS)
    spared = 0 if first_trains else attention  # by the first block: only its FFN trains
    if recompute:  # the inputs of the other blocks, and what the last one's recomputation holds
        kept, again = b * (L - 1) * D * N, block - (spared if L == 1 else 0)
    else:
        kept, again = L * block - spared, 0
    kept += _projector_bytes(first, samples) if tuned else 0
    kept += b * D * F * (model.load_in_4bit or model.load_in_8bit)  # the largest linear, widened for its product
    loss = FLOAT32 * D * N + samples * min(ANSWER_TOKENS, tokens) * s.V * (b + 3 * FLOAT32)
    routed = first.experts is None or bool(first.experts.router_owners)  # a router reads float32
    plain = not first.linears  # nothing is adapted, but soft prompts make gradients pass through every block
    last_block = again + (4 * b if per_block or plain else 8 if routed else 2 * b) * F * N
    return kept + max(loss, 20 * D * N, last_block)


def _projector_bytes(first: FirstTask, samples: int) -> int:
    """What a tuned projector keeps: the inputs of its norms, matrices and functions, and copies of cast weights."""
    b, total = first.base.dtype.itemsize, 0
    for part in first.shapes.projector:
        ins, outs = zip(*part.matrices, strict=True)
        rows, size = samples * first.image.patches // part.merged, FLOAT32 if part.wide else b
        total += rows * size * (sum(ins) + sum(outs[:-1]) + part.norms * ins[0])
        total += b * part.weights * (b < FLOAT32 and not part.wide)
    return total


def answer_bytes(first: FirstTask, questions: int, tokens: int, new: int) -> int:
    """The most that answering a batch holds, base and adapter included; each question has an image of its own.

    It holds keys and values of all tokens and of ``new`` ones; with LLaVA-1.5 once more for the prefixes that questions
    about one image share, of which a batch has at most ``WORTHWHILE``. Beside them are one block's tensors, of which
    ``7 D`` is measured. The tower runs before that.
    """
    s, b, N = first.shapes, first.base.dtype.itemsize, questions * tokens
    again = WORTHWHILE * tokens * first.base.family.vicuna
    cache = b * s.L * 2 * s.keys * questions * (tokens + new + again)
    block = N * b * (7 * s.D + 3 * s.F)
    rows = first.image.patches + first.image.tiles
    tower = b * questions * rows * (s.tower * s.tower_states + 2 * s.tower_ffn)
    return first.base_bytes + b * first.count() + round(max(cache + block, tower))


def make_plan(
    method: Method,
    benchmark: Benchmark,
    order: list[str],
    gpus: int = 1,
    deepspeed: str | None = None,
    tokens: int | None = None,
    extended_blocks: float | None = None,
    card: Card | None = None,
    mfu: float = MFU,
) -> dict[str, Any]:
    """The figures of ``clmoe plan``, memory in bytes; None if a file is missing or growth decides.

    A sample has ``tokens``, by default its image's and 64 of text, 256 if a ``card`` must hold it; a later task
    extends ``extended_blocks`` by one expert, on average. ``card``: whether the training fits it, and hours at the
    share ``mfu`` of its rate. Raises ClmoeError for unknown shapes, and for a batch that the GPUs do not divide.
    """
    config = method.config
    if extended_blocks is not None and not method.grows:
        raise ClmoeError(f"--extended-blocks: {config.name} adds no experts to later tasks")
    tasks = [benchmark.task(name) for name in order]
    sets = benchmark.general if config.evaluation.general else ()
    missing, notes, fetches = _absent(method, benchmark, [*tasks, *sets])
    tests = {task.name: _records(task.test, missing) for task in (*tasks, *sets)}
    groups = [tasks] if method.chain == "union" else [[task] for task in tasks]
    rows = [_training(group, config, tests, missing) for group in groups]
    values: dict[str, Any] = {"method": config.name, "model": config.model.path}
    found = {
        "tasks": rows,
        "general": {task.name: tests[task.name] for task in sets},
        "missing": missing,
        "notes": notes,
    }
    if method.chain == "none":
        rows[:] = [row | {"parameters": 0, "steps": 0} for row in rows]
        return values | {"trainable_parameters": 0, "downloads": downloads(benchmark, "", None)} | found
    if config.model.attention == "eager":
        notes.append("memory is that of model.attention=sdpa: eager also keeps the square of the tokens")
    first = first_task(method, tasks)
    trained, kept, growth = by_task(first, len(rows), extended_blocks)
    rows[:] = [row | {"parameters": number} for row, number in zip(rows, trained, strict=True)]
    if None in trained:
        notes.append("what a later task trains depends on the blocks that it extends: give --extended-blocks X")
    values |= _parameter_figures(first) | {"kept_parameters": kept, "growth": growth}
    values |= _memory_figures(first, gpus, deepspeed, first.tokens(LONG_TEXT if card else TEXT_TOKENS, tokens))
    asked = questions_asked(method, tasks, sets, tests)
    values["flops"] = _flops(first, rows, asked, first.tokens(TEXT_TOKENS, tokens))
    values["downloads"] = downloads(benchmark, config.model.path, first.base_parameters if fetches else None)
    if card is not None:
        values["card"] = _card_figures(card, values["memory"]["total"], values["flops"], gpus, mfu)
    return values | found


def _parameter_figures(first: FirstTask) -> dict[str, Any]:
    """What the first task attaches and trains."""
    return {
        "shapes": str(first.file),
        "image": asdict(first.image),
        "base_parameters": first.base_parameters,
        "linears": [asdict(x) | {"parameters": x.parameters} for x in first.linears],
        **{f"{part}_parameters": first.count(part) for part in PARTS},
        "trainable_parameters": first.count(),
    }


def _memory_figures(first: FirstTask, gpus: int, deepspeed: str | None, tokens: int) -> dict[str, Any]:
    """How a batch is cut, and a GPU's bytes for samples of ``tokens``."""
    config = first.method.config
    training = config.training
    cut = BatchPlan(config.seed, 0, training.batch_size, training.micro_batch_size, gpus)
    memory = state_bytes(first, gpus, deepspeed)
    memory["activations"] = activation_bytes(first, cut.micro, tokens, training.gradient_checkpointing)
    return {
        "batch": {"global": cut.batch_size, "gpus": gpus, "micro": cut.micro, "accumulation": cut.accumulation},
        "gradient_checkpointing": training.gradient_checkpointing,
        "memory": {"tokens": tokens, **memory, "total": sum(memory.values())},
    }


def _card_figures(card: Card, peak: int, flops: dict[str, int | None], gpus: int, mfu: float) -> dict[str, Any]:
    """Whether a peak fits each of the cards, and hours at the share ``mfu`` of their rate."""
    hours = {k: None if n is None else n / (mfu * card.rate * gpus) / 3600 for k, n in flops.items()}
    limits = {"name": card.name, "usable": round(USABLE * card.memory), "fits": peak <= USABLE * card.memory}
    return limits | {"mfu": mfu, "rate": card.rate, "hours": hours}


def _flops(first: FirstTask, rows: list[dict[str, Any]], asked: int | None, tokens: int) -> dict[str, int | None]:
    """FLOPs of all trainings, each like the first task's, and of all answers' prompts, without locators and probes."""
    config, sizes = first.method.config, (first.shapes, first.image)
    training, adapter = config.training, first.count("expert") + first.count("router")
    tuned, again = first.count("projector") > 0, training.gradient_checkpointing
    one = step_flops(*sizes, 1, tokens, min(ANSWER_TOKENS, tokens), adapter, tuned, again)
    steps = [row["steps"] for row in rows]
    answer = answer_flops(*sizes, tokens, adapter)
    return {
        "training": None if None in steps else one * training.batch_size * sum(steps),
        "answers": None if asked is None else asked * answer,
        "100,000 records": 100_000 * one,
        "100,000 answers": 100_000 * answer,
    }


def _training(tasks: list[Task], config: Config, tests: dict[str, int | None], missing: list[str]) -> dict[str, Any]:
    """Name, records and optimizer steps of a training: on one task, or on all at once, each for its own passes."""
    union, training = method_class(config.method).chain == "union", config.training
    train, test = [_records(task.train, missing) for task in tasks], [tests[task.name] for task in tasks]
    times = [task.passes if union else 1 for task in tasks]
    records = None if None in train else sum(n * k for n, k in zip(train, times, strict=True) if n)
    steps = total_steps(training, records or 0, 1 if union else tasks[0].passes, len(tasks))
    return {
        "task": "all" if union else tasks[0].name,
        "train_records": records,
        "test_records": None if None in test else sum(n for n in test if n),
        "steps": steps if training.steps or records else None,
    }


def _records(path: Path, missing: list[str]) -> int | None:
    return _unless(missing, lambda: count_records(path)) if path.is_file() else None


def _unless(missing: list[str], work: Callable[[], T]) -> T | None:
    """What ``work`` returns; None if it finds a file missing or unreadable, which is then added to ``missing``."""
    try:
        return work()
    except ClmoeError as error:
        missing.append(str(error))
    return None


def _absent(method: Method, benchmark: Benchmark, tasks: list[Task]) -> tuple[list[str], list[str], bool]:
    """(missing files and folders that would stop a run, what it will make or fetch, whether that is the base)."""
    missing: list[str] = []
    notes: list[str] = []
    if benchmark.built_on_first_use and not benchmark.root.exists():
        notes.append(f"the first training renders {benchmark.root} (or clmoe data prepare {benchmark.name})")
    else:
        names = [task.name for task in tasks]
        missing += [] if benchmark.root.is_dir() else [f"data folder {benchmark.root}"]
        missing += benchmark.missing_files(names)
        missing += [f"{t.name}: image folder {t.image_root}" for t in tasks if not (t.image_root.is_dir() or t.raw)]
        raw = [t.name for t in tasks if t.raw is not None and not all(path.is_file() for _, path in t.made)]
        fix = f"the first training prepares them, or clmoe data prepare {benchmark.name}"
        notes += [f"files in other formats of {', '.join(raw)}: {fix}"] if raw else []
    path = method.config.model.path
    folder = _unless(missing, lambda: Path(resolve_model_path(path)))
    if folder is not None and folder.is_dir() and not any(folder.glob("*.safetensors")):
        missing.append(f"model {folder}: no *.safetensors in it")
    fetches = folder is not None and not folder.is_dir() and try_to_load_from_cache(path, "config.json") is None
    if fetches:
        notes.append(f"model {path} is neither a folder nor in the hub's cache: the first training fetches it")
    _unless(missing, lambda: method.check_inputs(None, benchmark.root))
    return missing, notes, fetches


def plan_text(values: dict[str, Any]) -> str:
    """``make_plan``'s figures for a human, at most 100 columns wide except for names of files."""
    lines = [f"{values['method']} trains nothing", ""]
    kinds = ("task", "parameters", "train_records", "test_records", "steps")
    tasks = [_row(*kinds), *(_row(*(row[kind] for kind in kinds)) for row in values["tasks"])]
    tasks += [_row(f"general: {name}", 0, 0, number, 0) for name, number in values["general"].items()]
    if "memory" in values:
        lines = [f"{values['method']} on {values['model']} ({values['base_parameters']:,} frozen parameters)"]
        image = f"an image takes {values['image']['tokens']:,} tokens ({values['image']['source']})"
        lines += [
            f"shapes: {values['shapes']}",
            *wrap(image, 100),
            "",
        ]
        head = [("linear", "in", "out", "experts", "rank each", "blocks")] if values["linears"] else []
        lines += [_row(*row[:6]) for row in (*head, *(tuple(linear.values()) for linear in values["linears"]))]
        lines += ["", "trainable parameters in the first task"]
        lines += [_row(f"  {name}", values[f"{name}_parameters"]) for name in (*PARTS, "trainable")]
        lines += [*(_row(f"  per block later: {name}", n) for name, n in values["growth"].items()), ""]
        tasks += [_row("kept in the end", values["kept_parameters"]), ""]
        batch, memory = values["batch"], dict(values["memory"])
        cut = f"{batch['gpus']} GPU(s) x micro-batch {batch['micro']} x accumulation {batch['accumulation']}"
        tasks += [f"global batch {batch['global']} = {cut}"]
        chosen = f"training.gradient_checkpointing={values['gradient_checkpointing']}".lower()
        tasks += [f"memory of a GPU, at {memory.pop('tokens'):,} tokens a sample ({chosen})"]
        tasks += [_row(f"  {name}", f"{size / 2**30:,.2f} GiB") for name, size in memory.items() if size]
        tasks += ["to compute", *(_row(f"  {name}", _of(n, 1e15, "PFLOP")) for name, n in values["flops"].items())]
    if "card" in values:
        tasks += _on_card(values["card"], values["memory"]["total"], values["batch"]["gpus"])
    if values["downloads"]:
        tasks += ["", "to fetch:", *(f"  {line}" for line in values["downloads"])]
    missing = [wrap(item, 100, initial_indent="  ", subsequent_indent="    ") for item in values["missing"]]
    count = f"missing ({len(missing)})" if missing else "nothing is missing"
    return "\n".join([*lines, *tasks, "", *values["notes"], count, *(line for item in missing for line in item)])


def _on_card(card: dict[str, Any], total: int, gpus: int) -> list[str]:
    took = f"planned peak {total / 2**30:,.1f} of {card['usable'] / 2**30:,.1f} GiB, {USABLE:.0%} of the card"
    speed = f"hours at {card['mfu']:.0%} of {gpus} x {card['rate'] / 1e12:,.0f} TFLOP/s"
    hours = [_row(f"  {name}", _of(n, 1, "h")) for name, n in card["hours"].items()]
    return [f"{card['name']}: {'fits' if card['fits'] else 'does not fit'}, {took}", speed, *hours]


def _of(number: float | None, unit: float, name: str) -> str:
    return "?" if number is None else f"{number / unit:,.1f} {name}"


def _row(name: str, *cells: object) -> str:
    shown = ("?" if x is None else f"{x:,}" if isinstance(x, int) else str(x).replace("_", " ") for x in cells)
    return f"{name:<30}" + "".join(f"{x:>14}" for x in shown)
