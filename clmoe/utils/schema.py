"""What a mapping from YAML may hold: dataclasses with types and ranges; errors for unknown keys name the right one."""

import dataclasses
import functools
import inspect
import math
import re
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

import yaml

from clmoe.errors import ClmoeError
from clmoe.utils.names import unknown
from clmoe.utils.paths import shipped_root

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


@dataclass(frozen=True)
class Range:
    """What a number may be: from ``low`` to ``high``, excluding an ``open`` end; never NaN or infinity."""

    low: float
    high: float = math.inf
    open: Literal["", "low", "high", "both"] = ""

    def __contains__(self, value: float) -> bool:
        outside = {"low": (self.low,), "high": (self.high,), "both": (self.low, self.high)}.get(self.open, ())
        return self.low <= value <= self.high and value not in outside

    def __str__(self) -> str:
        low = f"above {self.low:,.10g}" if self.open in ("low", "both") else f"at least {self.low:,.10g}"
        high = f"below {self.high:,.10g}" if self.open in ("high", "both") else f"at most {self.high:,.10g}"
        return low if self.high == math.inf else f"{low} and {high}"


LARGEST = 65_536  # for numbers that take memory in proportion
Positive = Annotated[float, Range(0, 1e9, "low")]
NotNegative = Annotated[float, Range(0, 1e12)]
Share = Annotated[float, Range(0, 1)]
Inside = Annotated[float, Range(0, 1, "both")]
InnerShare = Annotated[float, Range(0, 1, "high")]
Count = Annotated[int, Range(1, LARGEST)]
Steps = Annotated[int, Range(1, 2**31 - 1)]
LearningRate = Annotated[float, Range(0, 1, "low")]


RENAMED = {  # keys of clmoe 0.1
    "options.decider": "locator (vae, nearest_mean, prototype, ...)",
    "options.feature": "locator.feature",
    "options.locator": "locator.options",
    "options.distance": "locator.options.distance",
    "options.radius": "locator.options.radius",
}
HOMES: dict[str, list[str]] = {}  # key -> its places in the configuration, which fills this


def _convert(value: Any, annotation: Any, where: str, make: bool = True) -> Any:
    """Check ``value`` against a field's type; a float may be written as an int, or as YAML's string ``1e-3``."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return (build if make else check_values)(annotation, value, where)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (inner,) = [a for a in arguments if a is not type(None)]
        return _convert(value, inner, where, make)
    if origin is Annotated:
        number = _convert(value, arguments[0], where)
        if number not in arguments[1]:
            raise ClmoeError(f"{where}: {value} is out of range, it must be {arguments[1]}")
        return number
    if origin is Literal:
        if value not in arguments:
            raise ClmoeError(f"{where}: {value!r} is not one of {', '.join(map(str, arguments))}")
        return value
    if origin is list and isinstance(value, list):
        return [_convert(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return value
    if annotation is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError) as error:
            raise ClmoeError(f"{where}: {str(value)[:40]!r} is not a number") from error
        if not math.isfinite(number):
            raise ClmoeError(f"{where}: {value} is not a finite number")
        return number
    if isinstance(annotation, type) and type(value) is annotation:
        return value
    wanted = getattr(annotation, "__name__", str(annotation))
    raise ClmoeError(f"{where}: {value!r} is a {type(value).__name__}, expected {wanted}")


def check_values(kind: type, values: Any, where: str, make: bool = False) -> dict[str, Any]:
    """The fields of a mapping, each checked alone against the dataclass ``kind``; with ``make``, sections are built.

    Raises ClmoeError for an unknown key, naming the nearest known one, and for a value of the wrong type or range.
    """
    if not isinstance(values, dict):
        raise ClmoeError(f"{where}: expected a mapping, got {values!r}")
    hints, found = typing.get_type_hints(kind, include_extras=True), {}
    for key, value in values.items():
        place = f"{where}.{key}" if where else str(key)
        if key not in hints:
            raise ClmoeError(f"{place}: {_hint(place, str(key)) or unknown('key', str(key), hints)}")
        found[key] = _convert(value, hints[key], place, make)
    return found


def build(kind: type[T], values: Any, where: str) -> T:
    """Fill the dataclass ``kind`` from a mapping. Raises ClmoeError as ``check_values``, and for a missing key."""
    found = check_values(kind, values, where, make=True)
    try:
        return kind(**found)
    except TypeError as error:
        raise ClmoeError(f"{where}: {error}".removeprefix(": ")) from error


@functools.cache
def words() -> dict[str, str]:
    """Words of the papers and of other libraries, and what to write instead."""
    return yaml.safe_load((shipped_root() / "configs" / "words.yaml").read_text(encoding="utf-8"))


def _hint(place: str, key: str) -> str:
    """What to write instead of a key of another section, clmoe 0.1, a paper or another library; empty if unknown."""
    if place in RENAMED:
        return f"{key} is now {RENAMED[place]}"
    found = [*HOMES.get(key, []), *filter(None, [words().get(key.lower())])]
    meant = [text for text in dict.fromkeys(found) if "." not in place or place not in re.split(r"[ ,:]+", text)]
    return f"unknown key {key!r}. Write {', or '.join(meant)}" if meant else ""


def told(example: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """For functions that users call: arguments that do not fit the annotations raise ClmoeError with the right call."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        """``function``, its arguments compared with its annotations before it runs."""
        signature = inspect.signature(function)

        @functools.wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            hints = typing.get_type_hints(function)
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError as error:
                raise ClmoeError(f"{error}: call {example}") from error
            for name, value in given.items():
                if name in hints and not _fits(value, hints[name]):
                    wanted = str(hints[name]).replace("typing.", "")
                    raise ClmoeError(f"{name}: found {type(value).__name__}, expected {wanted}: call {example}")
            return function(*args, **kwargs)

        return called

    return decorate


def _fits(value: Any, annotation: Any) -> bool:
    """Whether the outermost type fits."""
    if get_origin(annotation) in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in get_args(annotation))
    if annotation is Any:
        return True
    kind = get_origin(annotation) or annotation
    return isinstance(value, type(None) if kind is None else kind) and (kind is not int or not isinstance(value, bool))
