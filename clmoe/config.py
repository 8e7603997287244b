"""Configuration: dataclasses filled from YAML and ``key=value`` overrides; an unknown key fails and names the nearest.

Order of precedence, weakest first: the dataclass defaults, ``configs/methods/<name>.yaml``, the benchmark's
``recipe.comparable``, the user's own YAML of a method, the rest of the ``recipe``, what its ``recipe.methods`` says
about the method, what ``clmoe tune`` chose, the model's YAML, overrides on the command line.
"""

import dataclasses
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json
from clmoe.utils.names import unknown
from clmoe.utils.paths import find_config, known_configs, shipped_root
from clmoe.utils.plugins import installed
from clmoe.utils.schema import (
    HOMES,
    Count,
    InnerShare,
    LearningRate,
    NotNegative,
    Positive,
    Range,
    Share,
    Steps,
    build,
    check_values,
)
from clmoe.utils.settings import flat, merge, nested, parse_overrides, read_yaml

FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", *FFN_PROJECTIONS)
"""The linears of a LLaMA decoder block."""

FeatureKind = Literal["last", "pooled"]  # see ``LocatorConfig``
View = Literal["prompt", "text", "image_text"]
"""What a locator looks at in a sample: the whole prompt; its text without the image; image and text separately."""


@dataclass(frozen=True)
class ModelConfig:
    """The base to adapt: LLaVA-1.5 or another of docs/bases.md.

    Attributes:
        path: a folder or hub name in transformers' format; its config.json tells the family.
        dtype: of the frozen base; adapters and the projector are always float32.
        attention: of the language model; ``flash_attention_2`` needs a GPU and the package flash-attn.
        load_in_4bit: keep the frozen language model's blocks in 4 bits (NF4); needs bitsandbytes.
        load_in_8bit: the same in 8 bits (LLM.int8).
        architecture: a config.json with the shapes, for ``clmoe plan`` without the weights.
    """

    path: str = "playground/base"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    architecture: str = ""

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ClmoeError("model.load_in_8bit: the base is either in 4 or in 8 bits; set model.load_in_4bit=false")


@dataclass(frozen=True)
class LocatorConfig:
    """Who finds the task of a test sample, for methods that keep parts per task.

    Attributes:
        name: of ``clmoe.locators.LOCATORS``, such as ``oracle``, ``nearest_mean`` or ``vae``, a Python file that
            registers one, or an entry point ``clmoe.locators``; empty if none is needed.
        feature: the bare base's state of the last prompt token: after the final norm, or ``pooled``, over all layers.
        samples: at most this many of a task's training records are looked at.
        options: the locator's own fields, checked by its ``Options`` dataclass.
    """

    name: str = ""
    feature: FeatureKind = "last"
    samples: Steps = 2000
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class NoOptions:
    """For methods and locators without options of their own."""


@dataclass(frozen=True)
class AdapterConfig:
    """What is attached to the frozen base.

    Attributes:
        rank, rank_is: LoRA rank, over all experts together (``total``) or of each one (``per_expert``).
        experts: experts per adapted module at the start; plain LoRA methods ignore it.
        alpha: numerator of the update's scale: ``alpha / rank``, with ``rank`` counted as ``rank_is`` says.
        scale: the *effective* scale, ``s`` times the mean gate, the same with and without gates; replaces ``alpha``.
        dropout: on the adapter's input.
        as_released: experts as in CL-MoE's released code: A ~ N(0, 0.01^2) at every width, and a dropout mask for each.
        targets: the linears of each decoder block that are adapted.
        router_scope: one router ``per_linear`` (CoIN, CL-MoE) or ``per_block`` (LLaVA-CMoE).
        router_top_k: experts per token; None mixes all.
        train_projector: also train the projector between vision tower and language model.
    """

    rank: Count = 64
    rank_is: Literal["total", "per_expert"] = "total"
    experts: Annotated[int, Range(1, 1024)] = 8
    alpha: Positive = 128.0
    scale: Positive | None = None
    dropout: InnerShare = 0.0
    as_released: bool = False
    targets: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    router_scope: Literal["per_linear", "per_block"] = "per_linear"
    router_top_k: Count | None = None
    train_projector: bool = True

    def __post_init__(self) -> None:
        if not self.targets:
            raise ClmoeError(f"adapter.targets is empty: name some of {', '.join(LINEARS)}")
        for name in self.targets:
            if name not in LINEARS:
                raise ClmoeError(f"adapter.targets: {unknown('linear', name, LINEARS)}")
        others = [name for name in self.targets if name not in FFN_PROJECTIONS]
        if self.router_scope == "per_block" and others:
            raise ClmoeError(
                f"adapter.targets: {others[0]} is not a part of the FFN, whose projections share a router with "
                "adapter.router_scope=per_block"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """One task's optimisation, shared by all methods of a comparison.

    Attributes:
        learning_rate: of the adapter (AdamW).
        projector_learning_rate: of the projector when it is trained.
        epochs: passes over the task's records. ``steps`` of the same or a weaker source must be null, as it would win.
        steps: optimizer steps per task; wins over ``epochs`` of a weaker source.
        batch_size: **global** batch, over all processes and accumulation steps.
        micro_batch_size: samples per forward and process; None is the process's whole share.
        warmup_ratio: share of the steps with a linear warm-up; cosine decay to zero follows.
        weight_decay: of AdamW.
        max_grad_norm: the gradient is clipped to this norm.
        max_length: tokens per sample, image tokens included.
        gradient_checkpointing: recompute activations in the backward pass.
        workers: data-loading processes.
        save_steps: optimizer steps between two saved states of an unfinished training; 0 saves on SIGTERM only.
        keep_states: how many of them are kept; the second saves the day when the newest is damaged.
        logging_steps: steps between two lines of ``events.jsonl``.
        on_bad_record: training rows that cannot be used are an ``error``, or left out (``skip``), or keep their place
            in their batch without an answer token (``mask``), as in LLaVA's code; their number is printed.
        asd: share of a task's records that are rewritten in other answer styles (SEFE's ASD; 0.2 in its paper).
        asd_texts: a JSON file of explanations for them, see ``clmoe.data.styles``; without it, no record explains.
        trackers: transformers' ``report_to``: ``tensorboard``, ``wandb``.
    """

    learning_rate: LearningRate = 2e-4
    projector_learning_rate: Annotated[float, Range(0, 1)] = 2e-5
    epochs: Annotated[float, Range(0, 1e4, "low")] = 1.0
    steps: Steps | None = None
    batch_size: Count = 128
    micro_batch_size: Count | None = None
    warmup_ratio: Share = 0.03
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    max_length: Count = 2048
    gradient_checkpointing: bool = False
    workers: Annotated[int, Range(0, 1024)] = 0
    save_steps: Annotated[int, Range(0, 2**31 - 1)] = 100
    keep_states: Steps = 2
    logging_steps: Steps = 10
    on_bad_record: Literal["error", "mask", "skip"] = "error"
    asd: Share = 0.0
    asd_texts: str = ""
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy generation over the test questions.

    Attributes:
        batch_size: questions per batch.
        exact: answer again alone if the two best logits came closer than ``margin``: no answer depends on its batch.
        margin: see ``exact``; bfloat16's logits lie up to 0.125 apart, so the default finds only equal ones.
        share_images: on LLaVA-1.5, questions with the same image and router read its tokens once.
        limit: questions of each test file, drawn once and for all, to ask in rows before the last task; None asks all.
        general: also ask the benchmark's sets of general ability before training and after each task and, for forward
            transfer, all tasks before training and the next one after each. A benchmark that names sets turns it on.
    """

    batch_size: Count = 64
    exact: bool = True
    margin: NotNegative = 1e-3
    share_images: bool = True
    limit: Steps | None = None
    general: bool = False


@dataclass(frozen=True)
class BudgetConfig:
    """What all methods of a comparison may use; each field replaces settings of the method, see docs/budget.md.

    Attributes:
        parameters: how many the method has trained and keeps at the end, within 2 %: chooses ``adapter.rank``.
        stored_samples: training records of all tasks together that a method with a memory keeps: sets its size.
        steps: training steps of each task: sets ``training.steps``.
        extended_blocks: what ``parameters`` assumes of a method that grows: blocks that a later task extends.
    """

    parameters: Steps | None = None
    stored_samples: Steps | None = None
    steps: Steps | None = None
    extended_blocks: NotNegative | None = None


@dataclass(frozen=True)
class Config:
    """A method with everything that determines its result on a benchmark.

    Attributes:
        method: a registered name (``clmoe/methods``, or an entry point ``clmoe.methods``), or the path of a Python file
            that registers one method.
        label: how tables name this variant; the method's name when empty.
        seed: of initial weights, sample order and dropout.
        model, adapter, locator, training, evaluation, budget: the sections above.
        options: the method's own fields, checked by its ``Options`` dataclass.
        tune: what ``clmoe tune`` tries: keys of the method's own options, each with a list of values.
        tuned: a file that ``clmoe tune`` wrote; what it chose holds unless the command line says otherwise.
    """

    method: str
    label: str = ""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    locator: LocatorConfig = field(default_factory=LocatorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    options: dict[str, Any] = field(default_factory=dict)
    tune: dict[str, Any] = field(default_factory=dict, compare=False)
    tuned: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        return self.label or self.method


for _section, _kind in typing.get_type_hints(Config).items():
    for _field in dataclasses.fields(_kind) if dataclasses.is_dataclass(_kind) else ():
        HOMES.setdefault(_field.name, []).append(f"{_section}.{_field.name}")


def load_config(
    source: str,
    recipe: dict[str, Any],
    overrides: list[str],
    model: str | None = None,
    check: Callable[[Config], object] = lambda config: None,
    benchmark: str = "the benchmark",
) -> Config:
    """A method's configuration on a benchmark, whose defaults are ``recipe``, under ``key=value`` overrides.

    ``source`` names a file in ``configs/methods``, a YAML (``extends`` names the one that it changes), a Python file
    that registers a method, or an installed package's entry point; ``model`` a file in ``configs/models``, a path to
    one, or a model folder or hub name. An error, also one from ``check``, begins with the file, ``benchmark`` or option
    that gave the value.
    """
    shipped: dict[str, Any]
    if source.endswith(".py") or (source not in known_configs("methods") and source in installed("METHODS")):
        where, shipped, mine = source, {}, {"method": source}
    else:
        path = find_config("methods", source)
        where, (shipped, mine) = str(path), _method_values(path)
    own = _own_recipe(recipe, merge(shipped, mine))
    shared = {key: value for key, value in recipe.items() if key not in ("methods", "comparable")}
    layers = [
        (where, shipped),
        (f"{benchmark}: adapters: comparable", recipe.get("comparable", {})),
        (where, mine),
        (f"{benchmark}: recipe", shared),
        (f"{benchmark}: recipe.methods", own),
        (f"--base {model}", {} if model is None else {"model": model_values(model)}),
        (GIVEN, parse_overrides(overrides)),
    ]
    if tuned := next((layer["tuned"] for _, layer in reversed(layers) if layer.get("tuned")), None):
        layers.insert(-2, (f"tuned={tuned}", _tuned(Path(str(tuned)), merge(shipped, mine).get("method"))))
    return _resolved(layers, check, of_method=3)


def _tuned(file: Path, method: Any) -> dict[str, Any]:
    """The settings that ``clmoe tune`` chose. Raises ClmoeError for another kind of file, or another method."""
    found = read_json(file) if file.is_file() else None
    if not (isinstance(found, dict) and isinstance(found.get("chosen"), dict)):
        raise ClmoeError(f"tuned={file}: not a choice of settings: `clmoe tune {method} BENCHMARK` writes one")
    if found.get("method") != method:
        raise ClmoeError(f"tuned={file}: field 'method': {found.get('method')} was tuned, not {method}")
    return nested(found["chosen"])


GIVEN = "key=value"  # what errors call the settings of the command line or the caller


def _resolved(
    layers: list[tuple[str, dict[str, Any]]], check: Callable[[Config], object], of_method: int = 0
) -> Config:
    """The configuration of ``layers``, the weakest first, each with its name; the first ``of_method`` are the method's.

    If there are any, ``epochs`` and ``steps`` exclude each other.
    """
    try:
        values: dict[str, Any] = {}
        for _, layer in layers:
            values = _without_replaced_scale(merge(values, layer), layer)
        if of_method:
            _check_lengths(values, layers, of_method)
        config = build(Config, values, "")
        check(config)
    except ClmoeError as error:
        raise ClmoeError(f"{_origin(str(error), layers)}: {error}") from error
    return config


def _check_lengths(values: dict[str, Any], layers: list[tuple[str, dict[str, Any]]], of_method: int) -> None:
    """Refuse ``training.epochs`` if ``training.steps``, which wins, of the same or a weaker layer would silence it.

    A method's file may hold both, as a checkpoint's config.yaml does.
    """
    said = [[k for k, (_, v) in enumerate(layers) if f"training.{name}" in flat(v)] for name in ("epochs", "steps")]
    if all(said) and said[0][-1] >= max(of_method, said[1][-1]) and flat(values)["training.steps"] is not None:
        raise ClmoeError(
            f"training.epochs has no effect beside training.steps (from {layers[said[1][-1]][0]}), which wins: set "
            "training.steps=null, or leave out training.epochs"
        )


def _origin(message: str, layers: list[tuple[str, dict[str, Any]]]) -> str:
    """The strongest layer that sets the first key of ``message`` that any of them sets; else the first layer."""
    for key in re.findall(r"[a-z]\w*(?:\.\w+)*", message):
        for name, values in reversed(layers):
            if key in flat(values):
                return name
    return layers[0][0]


def check_recipe(recipe: dict[str, Any], where: str) -> None:
    """Raise ClmoeError for a key or value that no configuration can have; the method checks its own options."""
    own = recipe.get("methods", {})
    if not isinstance(own, dict):
        raise ClmoeError(f"{where}.methods: expected a mapping, got {own!r}")
    shared = {key: value for key, value in recipe.items() if key not in ("methods", "comparable")}
    for place, values in ((where, shared), *((f"{where}.methods.{name}", values) for name, values in own.items())):
        if not isinstance(values, dict):
            raise ClmoeError(f"{place}: expected a mapping, got {values!r}")
        try:
            check_values(Config, merge({}, values), "")
        except ClmoeError as error:
            raise ClmoeError(f"{place}.{error}") from error


def _without_replaced_scale(values: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """``adapter.scale`` replaces ``alpha``, but not if it comes from below a layer that gives ``alpha``."""
    given = layer.get("adapter")
    if isinstance(given, dict) and "alpha" in given and "scale" not in given:
        return values | {"adapter": {key: value for key, value in values["adapter"].items() if key != "scale"}}
    return values


def _own_recipe(recipe: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What the recipe says about this method; its locator's settings only if the method still has that locator."""
    own = merge({}, recipe.get("methods", {}).get(str(values.get("method")), {}))
    chosen = merge({}, {"locator": values.get("locator", {})})["locator"]
    if own.get("locator", {}).get("name") != chosen.get("name"):
        own.pop("locator", None)
    return own


def _method_values(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What shipped YAMLs say about a method, and what the user's own say over it; an extended one extends no other."""
    layers: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    values = read_yaml(path)
    files = [(path, values)]
    if "extends" in values:
        parent = find_config("methods", str(values.pop("extends")))
        files.insert(0, (parent, read_yaml(parent)))
        if "extends" in files[0][1]:
            raise ClmoeError(f"{path}: extends {parent}, which itself extends another file: name that one")
    for file, read in files:
        of_user = file.parent != shipped_root() / "configs" / "methods"
        layers = (layers[0], merge(layers[1], read)) if of_user else (merge(layers[0], read), layers[1])
    return layers


def model_values(model: str) -> dict[str, Any]:
    """A model's YAML by name (in any case) or path; anything else is a model folder or hub name itself."""
    names = {name.lower(): name for name in known_configs("models")}
    name = model if model.endswith((".yaml", ".yml")) else names.get(model.lower())
    return {"path": model} if name is None else read_yaml(find_config("models", name))


def recorded(config: Config) -> dict[str, Any]:
    """What a checkpoint records: all but what cannot make a difference to a training by itself.

    Keys that were added later are recorded only if not the default: checkpoints without them keep their bytes.
    """
    values = dataclasses.asdict(config)
    del values["model"]["architecture"], values["tune"], values["tuned"]
    if config.budget == BudgetConfig():
        del values["budget"]
    for key in ("model.load_in_8bit", "adapter.as_released", "training.on_bad_record", "training.asd",
                "training.asd_texts", "evaluation.general"):  # fmt: skip
        section, name = key.split(".")
        if values[section][name] == getattr(type(getattr(config, section)), name):
            del values[section][name]
    return values


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, the same bytes for equal configurations."""
    return yaml.safe_dump(recorded(config), sort_keys=True)


def reload_config(path: Path, overrides: list[str], check: Callable[[Config], object] = lambda config: None) -> Config:
    """A frozen ``config.yaml``, with overrides for evaluation; errors as from ``load_config``."""
    return _resolved([(str(path), read_yaml(path)), (GIVEN, parse_overrides(overrides))], check)
