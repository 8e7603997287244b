"""Configuration: dataclasses filled from YAML and ``key=value`` overrides; unknown keys fail and name the nearest.

Order of precedence, weakest first: the dataclass defaults, ``configs/methods/<name>.yaml``, the benchmark's ``recipe``,
what its ``recipe.methods`` says of the method, the model's YAML, overrides on the command line.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml

from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown
from clmoe.utils.paths import find_config, known_configs

T = TypeVar("T")

FFN_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", *FFN_PROJECTIONS)
"""The linears of a LLaMA decoder block."""

FeatureKind = Literal["last", "pooled"]  # see ``LocatorConfig``


@dataclass(frozen=True)
class ModelConfig:
    """The LLaVA-1.5 to adapt.

    Attributes:
        path: a folder or hub name in transformers' format.
        dtype: of the frozen base; adapters and the projector are always float32.
        attention: of the language model; ``flash_attention_2`` needs a GPU and the package flash-attn.
        load_in_4bit: keep the frozen language model's blocks in 4 bits (NF4); needs bitsandbytes and a CUDA device.
        architecture: a config.json with the shapes, for ``clmoe plan`` where the weights are not at hand.
    """

    path: str = "playground/base"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    load_in_4bit: bool = False
    architecture: str = ""


@dataclass(frozen=True)
class LocatorConfig:
    """Who finds the task of a test sample, for methods that keep parts per task.

    Attributes:
        name: ``oracle``, ``last``, ``random``, ``nearest_mean``, ``prototype`` or ``vae``; empty if none is needed.
        feature: the bare base's state of the last prompt token: after the final norm, or ``pooled``, over all layers.
        samples: of a task's training records, at most so many are looked at.
        options: the locator's own fields, checked by its ``Options`` dataclass.
    """

    name: str = ""
    feature: FeatureKind = "last"
    samples: int = 2000
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ClmoeError(f"locator.samples must be at least 1, not {self.samples}")


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
        scale: the *effective* scale, ``s`` times the mean gate, the same with and without one; replaces ``alpha``.
        dropout: on the adapter's input.
        targets: the linears of each decoder block that are adapted.
        router_scope: one router ``per_linear`` (CoIN, CL-MoE) or ``per_block`` (LLaVA-CMoE).
        router_top_k: experts per token; None mixes all.
        train_projector: also train the projector between vision tower and language model.
    """

    rank: int = 64
    rank_is: Literal["total", "per_expert"] = "total"
    experts: int = 8
    alpha: float = 128.0
    scale: float | None = None
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["gate_proj", "up_proj", "down_proj"])
    router_scope: Literal["per_linear", "per_block"] = "per_linear"
    router_top_k: int | None = None
    train_projector: bool = True

    def __post_init__(self) -> None:
        for name in ("rank", "experts", "router_top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ClmoeError(f"adapter.{name} must be at least 1, not {value}")
        if not 0 <= self.dropout < 1:
            raise ClmoeError(f"adapter.dropout must be at least 0 and below 1, not {self.dropout}")
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
        epochs: passes over the task's records; ignored when ``steps`` is set.
        steps: optimizer steps per task.
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
            in their batch without an answer token (``mask``), as in LLaVA's code; how many is printed.
        trackers: transformers' ``report_to``: ``tensorboard``, ``wandb``.
    """

    learning_rate: float = 2e-4
    projector_learning_rate: float = 2e-5
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 128
    micro_batch_size: int | None = None
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 2048
    gradient_checkpointing: bool = False
    workers: int = 0
    save_steps: int = 100
    keep_states: int = 2
    logging_steps: int = 10
    on_bad_record: Literal["error", "mask", "skip"] = "error"
    trackers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)


@dataclass(frozen=True)
class EvaluationConfig:
    """Greedy generation over the test questions.

    Attributes:
        batch_size: questions per batch.
        exact: answer alone, too, if the two best logits came closer than ``margin``: no answer depends on its batch.
        margin: see ``exact``; bfloat16's logits lie up to 0.125 apart, so that the default finds equal ones only.
        share_images: questions of one image and router read its tokens once.
        limit: questions of each test file, drawn once and for all, asked in rows before the last task; None asks all.
    """

    batch_size: int = 64
    exact: bool = True
    margin: float = 1e-3
    share_images: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Config:
    """A method with everything that determines its result on a benchmark.

    Attributes:
        method: a registered name (``clmoe/methods``), or the path of a Python file that registers one method.
        label: how tables name this variant; the method's name when empty.
        seed: of initial weights, sample order and dropout.
        model, adapter, locator, training, evaluation: the sections above.
        options: the method's own fields, checked by its ``Options`` dataclass.
    """

    method: str
    label: str = ""
    seed: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    locator: LocatorConfig = field(default_factory=LocatorConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.label or self.method


def _convert(value: Any, annotation: Any, where: str) -> Any:
    """Check ``value`` against a field's type; a float may be written as an int, or as YAML's string ``1e-3``."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return build(annotation, value, where)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(value, inner, where)
    if origin is Literal:
        if value not in arguments:
            raise ClmoeError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return value
    if annotation is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError as error:
            raise ClmoeError(f"{where}: {value!r} is not a number") from error
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ClmoeError(f"{where}: {value!r} is a {type(value).__name__}, expected {wanted}")


def build(kind: type[T], values: Any, where: str) -> T:
    """Fill the dataclass ``kind`` from a mapping.

    Raises ClmoeError for an unknown key, naming the nearest known one, and for a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ClmoeError(f"{where}: expected a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    for key in values:
        if key not in hints:
            new = RENAMED.get(f"{where}.{key}")
            raise ClmoeError(f"{where}: " + (f"{key} is now {new}" if new else unknown("key", str(key), hints)))
    try:
        return kind(**{key: _convert(value, hints[key], f"{where}.{key}") for key, value in values.items()})
    except TypeError as error:
        raise ClmoeError(f"{where}: {error}") from error


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Settings ``high`` over ``low``. A locator's bare name is short for its mapping; another drops its options."""
    below, above = _locator(low), _locator(high)
    named = below.get("name")
    if named is not None and above.get("name", named) != named:
        below = {key: value for key, value in below.items() if key != "options"}
    merged = _merge(low, high)
    return merged | {"locator": _merge(below, above)} if "locator" in merged else merged


def _locator(values: dict[str, Any]) -> dict[str, Any]:
    part = values.get("locator", {})
    if not isinstance(part, str | dict):
        raise ClmoeError(f"locator: expected a name or a mapping, got {part!r}")
    return {"name": part} if isinstance(part, str) else part


def _merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, mapping by mapping."""
    merged = dict(low)
    for key, value in high.items():
        both_maps = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both_maps else value
    return merged


RENAMED = {  # keys of clmoe 0.1
    "options.decider": "locator (vae, nearest_mean, prototype, ...)",
    "options.feature": "locator.feature",
    "options.locator": "locator.options",
    "options.distance": "locator.options.distance",
    "options.radius": "locator.options.radius",
}


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["training.steps=20", "options.beta=1"]`` -> nested mapping; values are YAML."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ClmoeError(f"override {pair!r}: write key=value, for instance training.steps=20")
        try:
            value: Any = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ClmoeError(f"override {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ClmoeError: unreadable file, broken YAML (with its line), or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ClmoeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ClmoeError(f"{path}: expected a mapping at the top, found {values!r}")
    return values


def load_config(source: str, recipe: dict[str, Any], overrides: list[str], model: str | None = None) -> Config:
    """A method's configuration on a benchmark, whose defaults are ``recipe``, under ``key=value`` overrides.

    ``source`` names a file in ``configs/methods``, a YAML (``extends`` names the one that it changes), or a Python file
    that registers a method; ``model`` a file in ``configs/models``, a path to one, or a model folder or hub name.
    """
    if source.endswith(".py"):
        path, values = Path(source), {"method": source}
    else:
        path = find_config("methods", source)
        values = _method_values(path)
    shared = {key: value for key, value in recipe.items() if key != "methods"}
    own = _own_recipe(recipe, values)
    for layer in (shared, own, {} if model is None else {"model": model_values(model)}, parse_overrides(overrides)):
        values = merge(values, layer)
    return build(Config, merge({}, values), str(path))


def _own_recipe(recipe: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """What the recipe says of this method; its locator's settings only where the method still has that locator."""
    own = dict(recipe.get("methods", {}).get(values.get("method"), {}))
    chosen = merge({}, {"locator": values.get("locator", {})})["locator"]
    if own.get("locator", {}).get("name") != chosen.get("name"):
        own.pop("locator", None)
    return own


def _method_values(path: Path) -> dict[str, Any]:
    """A method's YAML over the one it extends, which extends no other."""
    values = read_yaml(path)
    if "extends" not in values:
        return values
    parent = find_config("methods", str(values.pop("extends")))
    inherited = read_yaml(parent)
    if "extends" in inherited:
        raise ClmoeError(f"{path}: extends {parent}, which extends another file itself: name that one")
    return merge(inherited, values)


def model_values(model: str) -> dict[str, Any]:
    """A model's YAML by name (in any case) or path; anything else is a model folder or hub name itself."""
    names = {name.lower(): name for name in known_configs("models")}
    name = model if model.endswith((".yaml", ".yml")) else names.get(model.lower())
    return {"path": model} if name is None else read_yaml(find_config("models", name))


def recorded(config: Config) -> dict[str, Any]:
    """What a checkpoint records: all but ``model.architecture``, which cannot make a difference to a training.

    ``training.on_bad_record`` is left out where it is ``error``: then no row was bad.
    """
    values = dataclasses.asdict(config)
    del values["model"]["architecture"]
    if config.training.on_bad_record == "error":
        del values["training"]["on_bad_record"]
    return values


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, the same bytes for equal configurations."""
    return yaml.safe_dump(recorded(config), sort_keys=True)


def reload_config(path: Path, overrides: list[str]) -> Config:
    """A frozen ``config.yaml``, with overrides for evaluation."""
    return build(Config, merge(read_yaml(path), parse_overrides(overrides)), str(path))
