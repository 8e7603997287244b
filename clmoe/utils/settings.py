"""Settings as nested mappings: read from YAML and ``key=value``, merged, and flattened."""

from pathlib import Path
from typing import Any

import yaml

from clmoe.errors import ClmoeError


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """Settings ``high`` over ``low``. A locator's bare name is short for its mapping; a new name drops the options."""
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


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """``["training.steps=20", "options.beta=1"]`` -> nested mapping; values are YAML."""
    result: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise ClmoeError(f"override {pair!r}: write key=value, for instance training.steps=20")
        try:
            value: Any = yaml.safe_load(text)
        except (yaml.YAMLError, ValueError) as error:  # the latter: a day that does not exist, a number of 5,000 digits
            raise ClmoeError(f"override {pair!r}: the value is not YAML: {' '.join(str(error).split())}") from error
        result = merge(result, nested({key: value}))
    return result


def nested(values: dict[str, Any]) -> dict[str, Any]:
    """``{"options.beta": 1}`` -> ``{"options": {"beta": 1}}``."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        for part in reversed(key.split(".")):
            value = {part: value}
        result = merge(result, value)
    return result


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping. Raises ClmoeError for an unreadable file, broken YAML (with its line), or no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ClmoeError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ClmoeError(f"{path}: expected a mapping at the top, found {values!r}")
    return values


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values at every depth: ``{"training": {"steps": 3}, "training.steps": 3}``."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        below = {"name": value} if key == "locator" and isinstance(value, str) else value
        found |= {f"{prefix}{key}": value} | (flat(below, f"{prefix}{key}.") if isinstance(below, dict) else {})
    return found
