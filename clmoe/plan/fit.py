"""``--fit 24GB``: the settings with which a training fits a card, cheapest first.

Micro-batch, offloading and recomputation change a result by rounding at most, but take time; a base in fewer bits
changes it. So all of the former are tried before the latter, each in order of the time that it takes.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import Task
from clmoe.config import Config
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.plan import LONG_TEXT, USABLE, activation_bytes, answer_bytes, first_task, state_bytes
from clmoe.plan.cost import Card
from clmoe.utils.files import read_json
from clmoe.utils.paths import find_config
from clmoe.utils.settings import flat

NEW_TOKENS = 128  # of an answer
OFFLOAD = "zero2_offload"
BITS: tuple[dict[str, Any], ...] = (
    {},
    {"model.dtype": "bfloat16"},
    {"model.dtype": "bfloat16", "model.load_in_8bit": True},
    {"model.dtype": "bfloat16", "model.load_in_4bit": True},
)


@dataclass(frozen=True)
class Fitted:
    """What ``fit`` chose: settings, as a user would write them, and ZeRO's; planned and usable bytes."""

    settings: list[str]
    deepspeed: str | None
    planned: int
    usable: int
    line: str

    @property
    def fits(self) -> bool:
        return self.planned <= self.usable


def fit(
    config: Config,
    given: Collection[str],
    card: Card,
    gpus: int = 1,
    deepspeed: str | None = None,
    tasks: Sequence[Task] = (),
) -> Fitted:
    """The cheapest settings with which a training's planned peak, and then its answers', fit the card.

    ``given``: the user's own ``key=value`` settings, which stay. Images are those of ``tasks``. If nothing fits,
    returns what takes least. Raises ClmoeError for a method that trains nothing.
    """
    method = method_class(config.method)
    if method.chain == "none":
        raise ClmoeError(f"--fit: {config.name} trains nothing; set evaluation.batch_size")
    usable, tried = round(USABLE * card.memory), list[tuple[int, dict[str, Any], str | None]]()
    keys, offloads = {pair.partition("=")[0] for pair in given}, _offloads(deepspeed)
    for bits in _bits(config, keys):
        model = replace(config.model, **{name.partition(".")[2]: value for name, value in bits.items()})
        first = first_task(method(replace(config, model=model)), tasks)
        tokens = first.tokens(LONG_TEXT)
        for recompute, zero, micro in product(_recompute(config, keys), offloads, _micro(config, keys, gpus)):
            state = sum(state_bytes(first, gpus, zero).values())
            planned = state + activation_bytes(first, micro, tokens, recompute)
            chosen = {**bits, "training.micro_batch_size": micro, "training.gradient_checkpointing": recompute}
            tried.append((planned, chosen, zero))
            if planned <= usable:
                answers = _answers(config, keys)
                asked = next((n for n in answers if answer_bytes(first, n, tokens, NEW_TOKENS) <= usable), answers[-1])
                return _fitted(config, {**chosen, "evaluation.batch_size": asked}, zero, deepspeed, card, planned)
    planned, chosen, zero = min(tried, key=lambda option: option[0])
    return _fitted(config, chosen, zero, deepspeed, card, planned)


def _bits(config: Config, keys: Collection[str]) -> Iterator[dict[str, Any]]:
    """Changes of the base's type; none if it is already small, and only what the user left open."""
    fixed, now = config.model.load_in_4bit or config.model.load_in_8bit, flat(asdict(config))
    for change in BITS:
        new = {name: value for name, value in change.items() if now[name] != value}
        if not change or (new and not fixed and not keys & new.keys()):
            yield new


def _recompute(config: Config, keys: Collection[str]) -> list[bool]:
    now = config.training.gradient_checkpointing
    return [now] if now or "training.gradient_checkpointing" in keys else [False, True]


def _offloads(deepspeed: str | None) -> list[str | None]:
    """Without ZeRO there is nothing that could offload; a settings file may do so already."""
    if deepspeed is None:
        return [None]
    zero = read_json(find_config("deepspeed", deepspeed, ".json")).get("zero_optimization", {})
    there = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    return [deepspeed] if there or Path(deepspeed).suffix else [deepspeed, OFFLOAD]


def _micro(config: Config, keys: Collection[str], gpus: int) -> list[int]:
    """Micro-batches that cut the global batch evenly, from what is set down to one sample."""
    training = config.training
    share = max(1, training.batch_size // gpus)
    most = min(training.micro_batch_size or share, share)
    if "training.micro_batch_size" in keys:
        return [most]
    return [n for n in range(most, 0, -1) if training.batch_size % (n * gpus) == 0] or [most]


def _answers(config: Config, keys: Collection[str]) -> list[int]:
    """Batches of questions, halved from what is set down to one."""
    most = config.evaluation.batch_size
    return [most] if "evaluation.batch_size" in keys else [most >> k for k in range(most.bit_length())]


def _fitted(
    config: Config, chosen: dict[str, Any], zero: str | None, deepspeed: str | None, card: Card, planned: int
) -> Fitted:
    now = flat(asdict(config))
    changed = {name: value for name, value in chosen.items() if now[name] != value}
    settings = [f"{name}={str(value).lower()}" for name, value in changed.items()]
    shown = " ".join([*settings, *([] if zero == deepspeed else [f"--deepspeed {zero}"])])
    usable = round(USABLE * card.memory)
    if planned <= usable:
        verdict = shown or "nothing needs to change"
    else:
        verdict = f"does not fit, even with {shown}" if shown else "does not fit, and no setting is left to change"
    peak = f"planned peak {planned / 2**30:.1f} of {usable / 2**30:.1f} GiB"
    return Fitted(settings, zero, planned, usable, f"--fit {card.name}: {verdict} ({peak})")
