"""``clmoe doctor`` on machines that are made up: versions, devices and programs come from patched finders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from clmoe import cli
from clmoe.cli import doctor
from clmoe.system.doctor import Device, Finding, examine, report_text, requirements

A100, V100 = Device("A100", 80 * 2**30, (8, 0)), Device("V100", 32 * 2**30, (7, 0))
WANTED = [
    ("", Requirement("torch>=2.13,<2.14")),
    ("", Requirement("pillow>=12")),
    ("train", Requirement("deepspeed>=0.19,<0.20")),
    ("flash", Requirement("flash-attn>=2.8")),
    ("dev", Requirement("pytest>=9")),
    ("dev", Requirement("clmoe[demo,train]")),
]
GOOD = {
    "torch": "2.13.0+cu130",
    "pillow": "12.3.0",
    "deepspeed": "0.19.8",
    "flash-attn": "2.8.3",
    "bitsandbytes": "0.50",
}
Machine = Callable[..., dict[str, Finding]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Findings, by name, on a machine with these packages, GPUs, unimportable packages and absent programs."""

    def build(
        packages: dict[str, str] = GOOD,
        gpus: tuple[Device, ...] = (A100,),
        failing: dict[str, str] | None = None,
        without: tuple[str, ...] = (),
        memory: int = 64 * 2**30,
    ) -> dict[str, Finding]:
        monkeypatch.setattr(doctor, "requirements", lambda: iter(WANTED))
        monkeypatch.setattr(doctor, "installed", packages.get)
        monkeypatch.setattr(doctor, "import_error", (failing or {}).get)
        monkeypatch.setattr(doctor, "devices", lambda: list(gpus))
        monkeypatch.setattr(doctor, "program", lambda name: None if name in without else f"/usr/bin/{name}")
        monkeypatch.setattr(doctor, "available_memory", lambda: memory)
        return {finding.name: finding for finding in examine()}

    return build


def test_all_is_well(machine: Machine) -> None:
    found = machine()
    assert {finding.state for finding in found.values()} == {"ok"}
    assert not any(finding.fix for finding in found.values())
    assert found["GPU 0"].text == "A100, 80.0 GiB, compute capability 8.0"
    assert "pytest" not in found
    assert "all that is required works" in report_text(list(found.values()))


@pytest.mark.parametrize(
    ("package", "version", "state", "text", "fix"),
    [
        ("torch", None, "broken", "not installed (<2.14,>=2.13)", "pip install 'torch<2.14,>=2.13'"),
        ("torch", "2.14.0", "broken", "2.14.0 is not <2.14,>=2.13", "pip install 'torch<2.14,>=2.13'"),
        ("deepspeed", None, "missing", "not installed", "pip install 'clmoe[train]'"),
        ("deepspeed", "0.18.1", "missing", "0.18.1 is not", "pip install 'deepspeed<0.20,>=0.19'"),
        ("flash-attn", None, "missing", "not installed", "pip install 'clmoe[flash]'"),
    ],
)
def test_a_package_out_of_range(
    package: str, version: str | None, state: str, text: str, fix: str, machine: Machine
) -> None:
    versions = {name: known for name, known in GOOD.items() if name != package} | (
        {package: version} if version else {}
    )
    finding = machine(versions)[package]
    assert finding.state == state
    assert text in finding.text
    assert finding.fix == fix
    assert finding.broken == (state == "broken")


def test_compiled_code_for_another_torch(machine: Machine) -> None:
    found = machine(failing={"flash-attn": "ImportError: undefined symbol", "torch": "OSError: libcudart"})
    assert (found["torch"].state, found["flash-attn"].state) == ("broken", "missing")
    assert "undefined symbol" in found["flash-attention 2"].text
    assert "again" in found["flash-attn"].fix


def test_a_machine_without_gpu(machine: Machine) -> None:
    found = machine(gpus=())
    assert found["GPU"].state == found["flash-attention 2"].state == found["4-bit base"].state == "missing"
    assert found["sdpa"].state == found["bfloat16"].state == "ok"
    assert not any(finding.broken for finding in found.values())


def test_one_old_gpu_decides_what_all_can_do(machine: Machine) -> None:
    found = machine(gpus=(A100, V100))
    assert found["GPU 1"].text.endswith("compute capability 7.0")
    assert found["bfloat16"].state == found["flash-attention 2"].state == "missing"
    assert found["4-bit base"].state == "ok"


def test_compilers_are_named(machine: Machine) -> None:
    assert "g++ and ninja are there" in machine()["ZeRO"].text
    assert "no g++ and no ninja" in machine(without=("g++", "ninja"))["ZeRO"].text
    assert machine({name: v for name, v in GOOD.items() if name != "deepspeed"})["ZeRO"].state == "missing"


def test_little_memory(machine: Machine) -> None:
    assert machine(memory=2**30)["memory"].state == "missing"


def test_no_checkout(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    monkeypatch.setattr(doctor, "repository_root", lambda: tmp_path)
    found = machine()
    assert found["configs"].state == "ok"
    assert found["playground/base"].state == "missing"
    assert "build_base.sh" in found["playground/base"].fix


def test_the_ranges_are_pyprojects() -> None:
    ranges = {(extra, requirement.name): str(requirement.specifier) for extra, requirement in requirements()}
    assert ranges["", "peft"] == "<0.22,>=0.21"
    assert ranges["train", "deepspeed"] == "<0.20,>=0.19"


def test_the_text_fits_and_says_what_to_do(machine: Machine) -> None:
    findings = list(machine({"torch": "2.14.0"}, gpus=(), failing={"torch": "ImportError: " + "x y " * 60}).values())
    text = report_text(findings)
    assert max(map(len, text.splitlines())) <= 100
    for finding in findings:
        assert finding.name in text
    assert "-> pip install 'torch<2.14,>=2.13'" in text
    assert text.splitlines()[-1].startswith("broken: torch, pillow")


def test_the_verb(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine()
    cli.main(["doctor", "--json"])
    rows = json.loads(capsys.readouterr().out)
    assert {"name": "torch", "state": "ok", "text": "2.13.0+cu130 (<2.14,>=2.13)", "fix": ""} in rows
    machine({})
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "broken: torch, pillow" in capsys.readouterr().out
