"""What is installed and usable on this machine, each finding with what to do about it (``clmoe doctor``)."""

import importlib
import platform
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from packaging.requirements import Requirement
from packaging.version import Version

from clmoe.bases.families import FAMILIES
from clmoe.utils.paths import shipped_root
from clmoe.utils.versions import installed, requirements, tested

AMPERE = (8, 0)  # compute capability that bfloat16 and flash-attention 2 need
WITHOUT = "clmoe metrics, clmoe data prepare and clmoe doctor"  # which need none of these
TESTED = ("torch", "transformers", "peft", "accelerate", "datasets")
# packages with compiled code, which may have been built for another torch
IMPORTED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "flash-attn", "bitsandbytes")


@dataclass(frozen=True)
class Finding:
    """One line; ``fix`` says what to do. Optional things are ``missing``, required ones ``broken``."""

    name: str
    state: Literal["ok", "missing", "broken", "untested"]
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
    """All findings, in the order in which they are shown; the packages are ours and those of extras for users."""
    gpus = devices()
    packages = {
        package.name: _package(extra, package)
        for extra, package in requirements()
        if extra not in ("dev", "docs", "test") and package.name != "clmoe"
    }
    return [
        Finding("python", "ok", platform.python_version()),
        *packages.values(),
        _versions(packages),
        *_gpus(gpus),
        *_usable(gpus, packages),
        *_bases(packages),
        _base(),
    ]


def report_text(findings: list[Finding]) -> str:
    """One line per finding, with what to do below it."""
    lines, wrap = [], partial(textwrap.wrap, width=100, break_on_hyphens=False)
    for finding in findings:
        lines += wrap(f"{finding.state:<9}{finding.name:<20}{finding.text}", subsequent_indent=" " * 29)
        lines += wrap(f"{'':<29}-> {finding.fix}", subsequent_indent=" " * 32) if finding.fix else []
    broken = [finding.name for finding in findings if finding.broken]
    works = f"broken: {', '.join(broken)}; until then only {WITHOUT} work"
    fine = "all that is required works; what is missing is optional"
    return "\n".join([*lines, "", *wrap(works if broken else fine)])


def import_error(package: str) -> str | None:
    """Why an installed package cannot be imported; None if it can."""
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


def _versions(packages: dict[str, Finding]) -> Finding:
    """The tested versions of the packages on which results depend, and whether the installed ones lie within them."""
    low, high = tested("lowest"), tested("highest")
    beyond = []
    for name in TESTED:
        version = installed(name) if name in packages and packages[name].state == "ok" else None
        if version is not None and not Version(low[name]) <= Version(Version(version).public) <= Version(high[name]):
            beyond.append(f"{name} {version}")
    text = ", ".join(f"{name} {low[name]} to {high[name]}" for name in TESTED)
    if not beyond:
        return Finding("tested", "ok", text)
    fix = "they may work: bash scripts/test_versions.sh installed tries them, in a checkout"
    return Finding("tested", "untested", f"{', '.join(beyond)}; tested: {text}", fix)


def _gpus(gpus: list[Device]) -> Iterator[Finding]:
    if not gpus:
        yield Finding("GPU", "missing", "none: everything runs on the CPU", "real models need a machine with one")
    for index, gpu in enumerate(gpus):
        capability = ".".join(map(str, gpu.capability))
        text = f"{gpu.name}, {gpu.memory / 2**30:.1f} GiB, compute capability {capability}"
        yield Finding(f"GPU {index}", "ok", text)


def _usable(gpus: list[Device], packages: dict[str, Finding]) -> Iterator[Finding]:
    """What configurations may ask for: what it is, its package, how to ask for it, and whether there is a device."""
    modern = bool(gpus) and all(gpu.capability >= AMPERE for gpu in gpus)
    if gpus and not modern:
        yield Finding("bfloat16", "missing", "a GPU is older than Ampere", "set model.dtype=float32")
    else:
        yield Finding("bfloat16", "ok", "on every GPU" if gpus else "on the CPU, not faster than float32")
    for name, package, option, device in (
        ("flash-attention 2", "flash-attn", "model.attention=flash_attention_2", modern),
        ("4 and 8 bits", "bitsandbytes", "model.load_in_4bit=true or model.load_in_8bit=true", True),
        ("ZeRO", "deepspeed", "--deepspeed zero2 or zero2_offload", True),
    ):
        if packages[package].state != "ok":
            yield Finding(name, "missing", f"{option} needs {package}, see above")
        elif device:
            yield Finding(name, "ok", option)
        else:
            yield Finding(name, "missing", f"{option} needs {'an Ampere GPU or later' if gpus else 'a GPU'}")


def _bases(packages: dict[str, Finding]) -> list[Finding]:
    """The families whose processors can be imported, in one line; then each of the others."""
    if packages["torch"].broken or packages["transformers"].broken:
        return []
    usable, others = list[str](), list[Finding]()
    for name, family in FAMILIES.items():
        if problem := import_error(f"transformers.models.{name}.processing_{name}"):
            others.append(Finding(name, "missing", problem, "a newer transformers may not need it"))
        elif family.needs and (problem := import_error(family.needs)):
            others.append(Finding(name, "missing", problem, f"pip install {family.needs}"))
        else:
            usable.append(name)
    return [Finding("families of bases", "ok", ", ".join(usable)), *others]


def _base() -> Finding:
    """The embedded base."""
    base = shipped_root() / "playground" / "base"
    if (base / "model.safetensors").is_file():
        return Finding("playground/base", "ok", str(base))
    fix = "git checkout playground/base, or build it: bash scripts/playground/build_base.sh"
    return Finding("playground/base", "missing", f"no model.safetensors in {base}", fix)
