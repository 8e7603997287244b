"""``clmoe doctor`` on machines that are made up: versions and devices come from patched finders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clmoe import cli, doctor
from clmoe.doctor import Device, Finding, examine, report_text, requirements

A100, V100 = Device("A100", 80 * 2**30, (8, 0)), Device("V100", 32 * 2**30, (7, 0))
WANTED = {"": ["torch>=2.13,<2.14", "pillow>=12"], "train": ["deepspeed>=0.19,<0.20"], "flash": ["flash-attn>=2.8"]}
WANTED |= {"4bit": ["bitsandbytes>=0.48"], "dev": ["pytest>=9", "clmoe[demo,train]"]}
GOOD = {
    "torch": "2.13.0+cu130",
    "pillow": "12.3.0",
    "deepspeed": "0.19.8",
    "flash-attn": "2.8.3",
    "bitsandbytes": "1.0",
}
Machine = Callable[..., dict[str, Finding]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Findings, by name, on a machine with these packages (and versions), GPUs, and packages that fail to import."""

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
        ("torch", None, "broken", "pip install 'torch<2.14,>=2.13'"),
        ("torch", "2.14.0", "broken", "pip install 'torch<2.14,>=2.13'"),
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
    assert not_ok(machine()) == {"GPU", "flash-attention 2", "4-bit base"}
    assert not_ok(machine(A100, V100)) == {"bfloat16", "flash-attention 2"}  # one old GPU decides what all can do
    assert not_ok(machine(A100, deepspeed=None)) == {"deepspeed", "ZeRO"}
    monkeypatch.setattr(doctor, "shipped_root", lambda: tmp_path)
    assert not_ok(machine(A100)) == {"playground/base"}


def test_the_ranges_are_pyprojects() -> None:
    ranges = {(extra, requirement.name): str(requirement.specifier) for extra, requirement in requirements()}
    assert (ranges["", "peft"], ranges["train", "deepspeed"]) == ("<0.22,>=0.21", "<0.20,>=0.19")


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
