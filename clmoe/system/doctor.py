"""What is installed and usable on this machine, each finding with what to do about it (``clmoe doctor``)."""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from clmoe.errors import ClmoeError
from clmoe.utils.paths import repository_root

WIDTH = 100
LEAST_PYTHON = (3, 11)
NOT_FOR_USERS = ("dev",)
BF16_CAPABILITY = (8, 0)  # Ampere; flash-attention 2 needs it too
MODULES = {"flash-attn": "flash_attn", "pyyaml": "yaml", "pillow": "PIL", "scikit-learn": "sklearn"}
# these load compiled code of their own, which may have been built for another torch
IMPORTED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "flash-attn", "bitsandbytes")
LEAST_DISK, LEAST_MEMORY = 5 * 2**30, 4 * 2**30  # a sequence on the embedded benchmark needs less


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        state: ``ok``, ``missing`` (something optional) or ``broken`` (something required).
        text: what was found.
        fix: what to do; empty when nothing is to be done.
    """

    name: str
    state: Literal["ok", "missing", "broken"]
    text: str
    fix: str = ""

    @property
    def broken(self) -> bool:
        return self.state == "broken"

    def as_json(self) -> dict[str, str]:
        """All fields."""
        return {"name": self.name, "state": self.state, "text": self.text, "fix": self.fix}


@dataclass(frozen=True)
class Device:
    """A GPU: total memory in bytes, compute capability."""

    name: str
    memory: int
    capability: tuple[int, int]


def examine() -> list[Finding]:
    """All findings, in the order in which they are shown."""
    gpus = devices()
    return [_python(), *_packages(), *_gpus(gpus), *_usable(gpus), *_machine(), *_files()]


def report_text(findings: list[Finding]) -> str:
    """One line per finding, what to do below it."""
    lines = []
    for finding in findings:
        lines += _wrapped(f"{finding.state:<9}{finding.name:<20}{finding.text}", " " * 29)
        if finding.fix:
            lines += _wrapped(f"{'':<29}-> {finding.fix}", " " * 32)
    broken = [finding.name for finding in findings if finding.broken]
    return "\n".join([*lines, "", f"broken: {', '.join(broken)}" if broken else "all that is required works"])


def _wrapped(line: str, indent: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, drop_whitespace=True, break_on_hyphens=False) or [""]


def installed(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def import_error(package: str) -> str | None:
    """Why an installed package cannot be imported, None if it can."""
    try:
        importlib.import_module(MODULES.get(package, package))
    except Exception as error:  # compiled code fails in many ways
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return None


def program(name: str) -> str | None:
    """Path of a program."""
    return shutil.which(name)


def devices() -> list[Device]:
    """The GPUs that torch sees; none where torch cannot be imported."""
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
    path = Path(__file__).resolve().parents[2] / "pyproject.toml"
    if path.is_file():
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        yield from (("", Requirement(line)) for line in project["dependencies"])
        for extra, lines in project["optional-dependencies"].items():
            yield from ((extra, Requirement(line)) for line in lines)
        return
    try:
        lines = metadata.requires("clmoe") or []
    except metadata.PackageNotFoundError as error:
        raise ClmoeError("clmoe is neither a checkout nor installed") from error
    for requirement in map(Requirement, lines):
        marker = str(requirement.marker or "")
        yield marker.partition("extra == ")[2].strip("\"'"), requirement


def _python() -> Finding:
    version = platform.python_version()
    if sys.version_info[:2] >= LEAST_PYTHON:
        return Finding("python", "ok", version)
    return Finding("python", "broken", version, f"use Python {'.'.join(map(str, LEAST_PYTHON))} or later")


def _packages() -> Iterator[Finding]:
    """Every package of ours and of the extras that users install."""
    for extra, requirement in requirements():
        if extra not in NOT_FOR_USERS and requirement.name != "clmoe":
            yield _package(extra, requirement)


def _package(extra: str, requirement: Requirement) -> Finding:
    name, wanted = requirement.name, str(requirement.specifier)
    bad: Literal["missing", "broken"] = "missing" if extra else "broken"
    install = f"pip install 'clmoe[{extra}]'" if extra else f"pip install '{name}{wanted}'"
    version = installed(name)
    if version is None:
        return Finding(name, bad, f"not installed ({wanted})", install)
    if not requirement.specifier.contains(version, prereleases=True):
        return Finding(name, bad, f"{version} is not {wanted}", f"pip install '{name}{wanted}'")
    problem = import_error(name) if name in IMPORTED else None
    if problem:
        return Finding(name, bad, f"{version} cannot be imported: {problem}", "install it again for this torch")
    return Finding(name, "ok", f"{version} ({wanted})")


def _gpus(gpus: list[Device]) -> Iterator[Finding]:
    if not gpus:
        yield Finding("GPU", "missing", "none: everything runs on the CPU", "for real models use a machine with one")
    for index, gpu in enumerate(gpus):
        capability = ".".join(map(str, gpu.capability))
        yield Finding(f"GPU {index}", "ok", f"{gpu.name}, {_gib(gpu.memory)}, compute capability {capability}")


def _usable(gpus: list[Device]) -> Iterator[Finding]:
    """What configurations may ask for."""
    modern = bool(gpus) and all(gpu.capability >= BF16_CAPABILITY for gpu in gpus)
    if modern:
        yield Finding("bfloat16", "ok", "on every GPU")
    elif gpus:
        yield Finding("bfloat16", "missing", "a GPU older than Ampere", "set model.dtype=float32")
    else:
        yield Finding("bfloat16", "ok", "on the CPU, not faster than float32")
    yield Finding("sdpa", "ok", "model.attention=sdpa, the default")
    yield _needs(
        "flash-attention 2", "flash-attn", "model.attention=flash_attention_2", modern, "an Ampere GPU or later"
    )
    yield _needs("4-bit base", "bitsandbytes", "nf4 weights", bool(gpus), "a GPU")
    yield _deepspeed()


def _needs(name: str, package: str, what: str, device: bool, which: str) -> Finding:
    """Something that needs a package and a device."""
    if installed(package) is None:
        return Finding(name, "missing", f"{package} is not installed", f"pip install {package}, if you want {what}")
    problem = import_error(package)
    if problem:
        return Finding(name, "missing", f"{package} cannot be imported: {problem}", "install it again for this torch")
    if not device:
        return Finding(name, "missing", f"{package} is installed, but it needs {which}")
    return Finding(name, "ok", what)


def _deepspeed() -> Finding:
    """ZeRO itself compiles nothing; DeepSpeed's own optimizers do, and the shipped settings leave them alone."""
    if installed("deepspeed") is None or import_error("deepspeed"):
        return Finding("ZeRO", "missing", "DeepSpeed is not usable", "pip install 'clmoe[train]', or train without it")
    lacking = [name for name in ("g++", "ninja") if program(name) is None]
    compiler = f"no {' and no '.join(lacking)}" if lacking else "g++ and ninja are there"
    return Finding("ZeRO", "ok", f"--deepspeed zero2, zero3; {compiler} (only for optimizers that DeepSpeed compiles)")


def _machine() -> Iterator[Finding]:
    """Memory and disk."""
    memory = available_memory()
    if memory is not None:
        fix = "" if memory >= LEAST_MEMORY else "end other programs, or expect a slow machine"
        yield Finding("memory", "missing" if fix else "ok", f"{_gib(memory)} available", fix)
    disk = shutil.disk_usage(Path.cwd()).free
    fix = "" if disk >= LEAST_DISK else "make room; clmoe plan says how much a sequence needs"
    yield Finding("disk", "missing" if fix else "ok", f"{_gib(disk)} free in {Path.cwd()}", fix)


def available_memory() -> int | None:
    """Bytes that programs can still take, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        names = os.sysconf_names
        known = "SC_AVPHYS_PAGES" in names and "SC_PAGE_SIZE" in names
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else None


def _files() -> Iterator[Finding]:
    """The configurations and the embedded base."""
    try:
        root = repository_root()
    except ClmoeError as error:
        yield Finding(
            "configs", "broken", str(error), "run in the checkout: only YAML files given by their path work here"
        )
        return
    yield Finding("configs", "ok", str(root / "configs"))
    base = root / "playground" / "base"
    if (base / "model.safetensors").is_file():
        yield Finding("playground/base", "ok", str(base))
    else:
        fix = "git checkout playground/base, or build it: bash scripts/playground/build_base.sh"
        yield Finding("playground/base", "missing", f"no model.safetensors in {base}", fix)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
