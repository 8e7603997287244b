"""``clmoe doctor`` on machines that are made up: versions and devices come from patched finders."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clmoe import cli, doctor
from clmoe.doctor import Device, Finding, examine, report_text, requirements

A100, V100 = Device("A100", 80 * 2**30, (8, 0)), Device("V100", 32 * 2**30, (7, 0))
WANTED = [
    ("", Requirement("torch>=2.13,<2.14")),
    ("", Requirement("pillow>=12")),
    ("train", Requirement("deepspeed>=0.19,<0.20")),
    ("flash", Requirement("flash-attn>=2.8")),
    ("dev", Requirement("pytest>=9")),
    ("dev", Requirement("clmoe[demo,train]")),
]
GOOD = {"torch": "2.13.0+cu130", "pillow": "12.3.0", "deepspeed": "0.19.8", "flash-attn": "2.8.3", "bitsandbytes": "1"}
Machine = Callable[..., dict[str, Finding]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Findings, by name, on a machine with these packages, GPUs and unimportable packages."""

    def build(
        packages: dict[str, str] = GOOD,
        gpus: tuple[Device, ...] = (A100,),
        failing: dict[str, str] | None = None,
    ) -> dict[str, Finding]:
        monkeypatch.setattr(doctor, "requirements", lambda: iter(WANTED))
        monkeypatch.setattr(doctor, "installed", packages.get)
        monkeypatch.setattr(doctor, "import_error", (failing or {}).get)
        monkeypatch.setattr(doctor, "devices", lambda: list(gpus))
        return {finding.name: finding for finding in examine()}

    return build


def test_all_is_well(machine: Machine) -> None:
    found = machine()
    assert {finding.state for finding in found.values()} == {"ok"}
    assert not any(finding.fix for finding in found.values())
    assert all(part in found["GPU 0"].text for part in ("A100", "80.0 GiB", "8.0"))
    assert "pytest" not in found


@pytest.mark.parametrize(
    ("package", "version", "state", "fix"),
    [
        ("torch", None, "broken", "pip install 'torch<2.14,>=2.13'"),
        ("torch", "2.14.0", "broken", "pip install 'torch<2.14,>=2.13'"),
        ("deepspeed", None, "missing", "pip install 'clmoe[train]'"),
        ("deepspeed", "0.18.1", "missing", "pip install 'deepspeed<0.20,>=0.19'"),
        ("flash-attn", None, "missing", "pip install 'clmoe[flash]'"),
    ],
)
def test_a_package_out_of_range(package: str, version: str | None, state: str, fix: str, machine: Machine) -> None:
    versions = {name: known for name, known in GOOD.items() if name != package}
    finding = machine(versions | ({package: version} if version else {}))[package]
    assert (finding.state, finding.fix, finding.broken) == (state, fix, state == "broken")
    assert (version or "not installed") in finding.text


def test_compiled_code_for_another_torch(machine: Machine) -> None:
    found = machine(failing={"flash-attn": "ImportError: undefined symbol", "torch": "OSError: libcudart"})
    assert (found["torch"].state, found["flash-attn"].state) == ("broken", "missing")
    assert "undefined symbol" in found["flash-attention 2"].text


@pytest.mark.parametrize(
    ("gpus", "missing"),
    [((), {"GPU", "flash-attention 2", "4-bit base"}), ((A100, V100), {"bfloat16", "flash-attention 2"})],
)
def test_devices_decide_what_is_usable(gpus: tuple[Device, ...], missing: set[str], machine: Machine) -> None:
    """One old GPU decides what all can do."""
    assert {name for name, finding in machine(gpus=gpus).items() if finding.state != "ok"} == missing


def test_without_deepspeed_and_embedded_base(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "repository_root", lambda: tmp_path)
    found = machine({name: version for name, version in GOOD.items() if name != "deepspeed"})
    assert {name for name in found if found[name].state == "missing"} == {"deepspeed", "ZeRO", "playground/base"}


def test_the_ranges_are_pyprojects() -> None:
    ranges = {(extra, requirement.name): str(requirement.specifier) for extra, requirement in requirements()}
    assert (ranges["", "peft"], ranges["train", "deepspeed"]) == ("<0.22,>=0.21", "<0.20,>=0.19")


def test_the_verb(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine()
    cli.main(["doctor", "--json"])
    assert {"torch", "ZeRO"} <= {row["name"] for row in json.loads(capsys.readouterr().out) if row["state"] == "ok"}
    findings = machine({}, failing={"torch": "ImportError: " + "x y " * 60})
    assert max(map(len, report_text(list(findings.values())).splitlines())) <= 100
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "broken: torch, pillow" in capsys.readouterr().out
