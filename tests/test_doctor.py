"""``clmoe doctor`` on invented machines: versions and devices come from patched finders."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from clmoe import cli, doctor
from clmoe.bases.families import FAMILIES
from clmoe.doctor import Device, Finding, examine, report_text
from clmoe.utils import versions

A100, V100 = Device("A100", 80 * 2**30, (8, 0)), Device("V100", 32 * 2**30, (7, 0))
WANTED = {"": ["torch>=2.7,<3", "transformers>=5.0,<6", "pillow>=12"], "train": ["deepspeed>=0.19,<0.20"]}
WANTED |= {"flash": ["flash-attn>=2.8"], "4bit": ["bitsandbytes>=0.48"], "dev": ["pytest>=9", "clmoe[demo,train]"]}
GOOD = {
    "torch": "2.13.0+cu130",
    "transformers": "5.24.0",
    "pillow": "12.3.0",
    "deepspeed": "0.19.8",
    "flash-attn": "2.8.3",
    "bitsandbytes": "1.0",
}
Machine = Callable[..., dict[str, Finding]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A function that gives the findings, by name, on a machine with these GPUs, packages and failing imports."""

    def build(*gpus: Device, failing: dict[str, str] | None = None, **packages: str | None) -> dict[str, Finding]:
        versions = GOOD | {name.replace("_", "-"): version for name, version in packages.items()}
        wanted = [(extra, Requirement(line)) for extra, lines in WANTED.items() for line in lines]
        monkeypatch.setattr(doctor, "requirements", lambda: iter(wanted))
        monkeypatch.setattr(doctor, "installed", versions.get)
        monkeypatch.setattr(doctor, "import_error", (failing or {}).get)
        monkeypatch.setattr(doctor, "devices", lambda: list(gpus))
        return {finding.name: finding for finding in examine()}

    return build


def not_ok(found: dict[str, Finding]) -> set[str]:
    return {name for name, finding in found.items() if finding.state != "ok"}


def test_all_is_well(machine: Machine) -> None:
    found = machine(A100)
    assert not_ok(found) == set() and not any(finding.fix for finding in found.values())
    assert all(part in found["GPU 0"].text for part in ("A100", "80.0 GiB", "8.0"))
    assert "pytest" not in found


@pytest.mark.parametrize(
    ("package", "version", "state", "fix"),
    [
        ("torch", None, "broken", "pip install 'torch<3,>=2.7'"),
        ("torch", "2.6.0", "broken", "pip install 'torch<3,>=2.7'"),
        ("deepspeed", "0.18.1", "missing", "pip install 'deepspeed<0.20,>=0.19'"),
        ("flash-attn", None, "missing", "pip install 'clmoe[flash]'"),
    ],
)
def test_a_package_out_of_range(package: str, version: str | None, state: str, fix: str, machine: Machine) -> None:
    finding = machine(A100, **{package: version})[package]
    assert (finding.state, finding.fix, finding.broken) == (state, fix, state == "broken")
    assert (version or "not installed") in finding.text


def test_compiled_code_for_another_torch(machine: Machine) -> None:
    found = machine(A100, failing={"flash-attn": "ImportError: undefined symbol", "torch": "OSError: libcudart"})
    assert (found["torch"].state, found["flash-attn"].state) == ("broken", "missing")
    assert "undefined symbol" in found["flash-attn"].text and "flash-attn" in found["flash-attention 2"].text


def test_what_is_usable(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not_ok(machine()) == {"GPU", "flash-attention 2"}
    assert not_ok(machine(A100, V100)) == {"bfloat16", "flash-attention 2"}  # one old GPU decides what all can do
    assert not_ok(machine(A100, deepspeed=None)) == {"deepspeed", "ZeRO"}
    monkeypatch.setattr(doctor, "shipped_root", lambda: tmp_path)
    assert not_ok(machine(A100)) == {"playground/base"}


def test_families_of_bases_that_lack_a_package_are_named(machine: Machine) -> None:
    lacking = {"num2words": "no num2words", "transformers.models.gemma3.processing_gemma3": "no torchvision"}
    found = machine(A100, failing=lacking)
    assert not_ok(found) == {"smolvlm", "gemma3"}
    assert {found["smolvlm"].text, found["gemma3"].text} == set(lacking.values())
    assert "num2words" in found["smolvlm"].fix
    assert sorted([*found["families of bases"].text.split(", "), "smolvlm", "gemma3"]) == sorted(FAMILIES)
    assert "families of bases" not in machine(A100, transformers="4.57.6")


def test_versions_beyond_the_tested_ones_are_named(machine: Machine) -> None:
    for version, state in (("2.7.0", "ok"), ("2.13.0+cu130", "ok"), ("2.99.1+cpu", "untested")):
        finding = machine(A100, torch=version)["tested"]
        assert finding.state == state and not finding.broken and "2.7.0 to" in finding.text
        assert ("torch 2.99.1" in finding.text) == ("test_versions.sh" in finding.fix) == (state != "ok")


def test_the_tested_sets_are_the_ends_of_pyprojects_ranges() -> None:
    ranges = {(extra, requirement.name): requirement.specifier for extra, requirement in versions.requirements()}
    assert str(ranges["", "peft"]) == "<1,>=0.18"
    lines = (Path(doctor.__file__).parents[1] / "constraints.txt").read_text().lower().split()
    pinned, low, high = dict(line.split("==") for line in lines), versions.tested("lowest"), versions.tested("highest")
    needed = {name: bounds for (extra, name), bounds in ranges.items() if not extra}
    assert needed.keys() == high.keys() == low.keys() - {"torchvision"}
    for name, bounds in needed.items():
        (floor,) = [part.version for part in bounds if part.operator == ">="]
        assert Version(floor) == Version(low[name]) <= Version(pinned[name]) <= Version(high[name])
        assert bounds.contains(high[name])


@pytest.mark.slow
def test_an_old_stack_is_named_and_what_needs_none_works(tmp_path: Path) -> None:
    """With transformers 4, `import clmoe` and a verb name the fix in one line, while doctor and metrics still work."""
    old = tmp_path / "transformers-4.57.6.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: transformers\nVersion: 4.57.6\n")
    (tmp_path / "matrix.csv").write_text("after,a,b\na,50,\nb,40,60\n")
    root = str(Path(doctor.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])}

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    fix = "pip install 'transformers<6,>=5.0'"
    imported, asked = python("-c", "import clmoe"), python("-m", "clmoe", "demo", "x")
    assert imported.stderr.splitlines()[-1].startswith("ImportError: ") and fix in imported.stderr
    assert (asked.returncode, len(asked.stderr.splitlines())) == (2, 1) and fix in asked.stderr
    examined = python("-m", "clmoe", "doctor")
    assert examined.returncode == 1 and fix in examined.stdout and "broken: transformers; until" in examined.stdout
    assert "last" in python("-m", "clmoe", "metrics", "matrix.csv").stdout


def test_the_verb(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine(A100)
    cli.main(["doctor", "--json"])
    assert {"torch", "ZeRO"} <= {row["name"] for row in json.loads(capsys.readouterr().out) if row["state"] == "ok"}
    findings = machine(pillow=None, failing={"torch": "ImportError: " + "x y " * 60})
    assert max(map(len, report_text(list(findings.values())).splitlines())) <= 100
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "broken: torch, pillow" in capsys.readouterr().out
