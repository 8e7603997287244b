"""What is installed and usable on this machine, each finding with what to do about it (``clmoe doctor``)."""

import importlib
import platform
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from clmoe.errors import ClmoeError
from clmoe.utils.paths import repository_root

LEAST_PYTHON = (3, 11)
AMPERE = (8, 0)  # compute capability that bfloat16 and flash-attention 2 need
# packages with compiled code, which may have been built for another torch
IMPORTED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "flash-attn", "bitsandbytes")


@dataclass(frozen=True)
class Finding:
    """One line; optional things are ``missing``, required ones ``broken``, and ``fix`` says what to do."""

    name: str
    state: Literal["ok", "missing", "broken"]
    text: str
    fix: str = ""

    @property
    def broken(self) -> bool:
        return self.state == "broken"


@dataclass(frozen=True)
class Device:
    """A GPU: total memory in bytes, compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown: each package is ours or of an extra that users install."""
    gpus = devices()
    wanted = [(extra, package) for extra, package in requirements() if extra != "dev" and package.name != "clmoe"]
    packages = [_package(extra, package) for extra, package in wanted]
    return [_python(), *packages, *_gpus(gpus), *_usable(gpus), *_files()]


def report_text(findings: list[Finding]) -> str:
    """One line per finding, what to do below it."""
    lines, wrap = [], partial(textwrap.wrap, width=100, break_on_hyphens=False)
    for finding in findings:
        lines += wrap(f"{finding.state:<9}{finding.name:<20}{finding.text}", subsequent_indent=" " * 29)
        lines += wrap(f"{'':<29}-> {finding.fix}", subsequent_indent=" " * 32) if finding.fix else []
    broken = [finding.name for finding in findings if finding.broken]
    return "\n".join([*lines, "", f"broken: {', '.join(broken)}" if broken else "all that is required works"])


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def import_error(package: str) -> str | None:
    """Why an installed package cannot be imported, None if it can."""
    try:
        importlib.import_module(package.replace("-", "_"))
    except Exception as error:  # compiled code fails in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def devices() -> list[Device]:
    """The GPUs that torch sees; none where torch cannot be imported, which is why it is imported here."""
    if import_error("torch"):
        return []
    import torch

    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [Device(gpu.name, gpu.total_memory, (gpu.major, gpu.minor)) for gpu in found]


def requirements() -> Iterator[tuple[str, Requirement]]:
    """(extra or "", requirement) of this package: from pyproject.toml in a checkout, else as it was installed.

    Raises:
        ClmoeError: neither is there.
    """
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
            yield from ((extra, Requirement(line)) for line in lines)
        return
    if installed("clmoe") is None:
        raise ClmoeError("clmoe is neither a checkout nor installed")
    for requirement in map(Requirement, metadata.requires("clmoe") or []):
        yield str(requirement.marker or "").partition("extra == ")[2].strip("\"'"), requirement


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] >= LEAST_PYTHON:
        return Finding("python", "ok", version)
    return Finding("python", "broken", version, f"use Python {'.'.join(map(str, LEAST_PYTHON))} or later")


def _package(extra: str, requirement: Requirement) -> Finding:
    name, wanted, version = requirement.name, str(requirement.specifier), installed(requirement.name)
    bad: Literal["missing", "broken"] = "missing" if extra else "broken"
    install = f"pip install '{name}{wanted}'"
    if version is None:
        return Finding(name, bad, f"not installed ({wanted})", f"pip install 'clmoe[{extra}]'" if extra else install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, bad, f"{version} is not {wanted}", install)
    problem = import_error(name) if name in IMPORTED else None
    if problem:
        return Finding(name, bad, f"{version} cannot be imported: {problem}", "install it again for this torch")
    return Finding(name, "ok", f"{version} ({wanted})")


def _gpus(gpus: list[Device]) -> Iterator[Finding]:
    if not gpus:
        yield Finding("GPU", "missing", "none: everything runs on the CPU", "real models need a machine with one")
    for index, gpu in enumerate(gpus):
        capability = ".".join(map(str, gpu.capability))
        text = f"{gpu.name}, {gpu.memory / 2**30:.1f} GiB, compute capability {capability}"
        yield Finding(f"GPU {index}", "ok", text)


def _usable(gpus: list[Device]) -> Iterator[Finding]:
    """What configurations may ask for."""
    modern = bool(gpus) and all(gpu.capability >= AMPERE for gpu in gpus)
    if gpus and not modern:
        yield Finding("bfloat16", "missing", "a GPU is older than Ampere", "set model.dtype=float32")
    else:
        yield Finding("bfloat16", "ok", "on every GPU" if gpus else "on the CPU, not faster than float32")
    attention = "model.attention=flash_attention_2"
    yield _needs("flash-attention 2", "flash-attn", attention, modern, "an Ampere GPU or later")
    yield _needs("4-bit base", "bitsandbytes", "model.load_in_4bit=true", bool(gpus), "a GPU")
    yield _needs("ZeRO", "deepspeed", "--deepspeed zero2 or zero2_offload", True, "")


def _needs(name: str, package: str, option: str, device: bool, which: str) -> Finding:
    """An option that needs a package and a device."""
    if installed(package) is None:
        return Finding(name, "missing", f"{package} is not installed", f"pip install {package}, if you want {option}")
    problem = import_error(package)
    if problem:
        return Finding(name, "missing", f"{package} cannot be imported: {problem}", "install it again for this torch")
    if not device:
        return Finding(name, "missing", f"{package} is installed, but it needs {which}")
    return Finding(name, "ok", option)


def _files() -> Iterator[Finding]:
    """The configurations and the embedded base."""
    try:
        root = repository_root()
    except ClmoeError as error:
        yield Finding("configs", "broken", str(error), "run in the checkout: only YAML files given by path work here")
        return
    yield Finding("configs", "ok", str(root / "configs"))
    base = root / "playground" / "base"
    if (base / "model.safetensors").is_file():
        yield Finding("playground/base", "ok", str(base))
    else:
        fix = "git checkout playground/base, or build it: bash scripts/playground/build_base.sh"
        yield Finding("playground/base", "missing", f"no model.safetensors in {base}", fix)
