"""A checkpoint that clmoe 0.1 sealed gives the same scores once it is converted."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

from clmoe.cli import main
from clmoe.train.checkpoint import read_checkpoint, seal
from clmoe.utils.files import read_json, write_json
from tests.runs import Runs, contents

GROWING = ("adapter.train_projector=false", "options.extend=every", "locator.samples=20")
VAE = ("steps=60", "hidden=16", "latent=4", "held_out=0.5")
METHODS = {
    "clmoe": ("clmoe", ["options.samples=20", "locator.samples=20", "locator.options.distance=cosine"]),
    "vae": ("llava_cmoe", [*GROWING, *(f"locator.options.{option}" for option in VAE)]),
    "prototype": ("llava_cmoe", [*GROWING, "locator=prototype", "locator.feature=pooled"]),
    "separate": ("lora", []),
}
"""Case -> today's method, and its settings."""


def seal_as_0_1(checkpoint: Path, case: str, old: Path) -> None:
    """``checkpoint`` in format 1: the locator's settings among the method's options, its file without settings."""
    shutil.copytree(checkpoint, old)
    values = yaml.safe_load((old / "config.yaml").read_text())
    locator, bank = values.pop("locator"), old / "locator.safetensors"
    values["adapter"]["budget"] = None
    if case == "clmoe":
        values["options"] |= locator["options"]
    elif case == "separate":
        values["method"] = case
    else:
        values["options"] |= {"decider": case, "feature": locator["feature"], "samples": locator["samples"]}
        values["options"]["locator"] = locator["options"]
    (old / "config.yaml").write_text(yaml.safe_dump(values))
    write_json(old / "continual.json", read_json(old / "continual.json") | {"method": values["method"]})
    if bank.is_file():
        save_file(load_file(bank), bank)
    if case == "prototype":  # beside the bank of the other locator
        bank.rename(old / "prototypes.safetensors")
        bank.touch()
    seal(old)
    write_json(old / "manifest.json", read_json(old / "manifest.json") | {"format_version": "1"})


@pytest.mark.parametrize("case", METHODS)
def test_a_converted_checkpoint_evaluates_to_the_same_matrix(
    case: str, runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, settings = METHODS[case]
    checkpoint, old, converted = runs.chain(method, *settings)[1], tmp_path / "old", tmp_path / "converted"
    seal_as_0_1(checkpoint, case, old)
    with pytest.raises(SystemExit):
        runs.evaluate(old, tmp_path / "refused")
    assert f"clmoe convert {old}" in capsys.readouterr().err
    main(["convert", str(old), str(converted)])
    config = read_checkpoint(checkpoint).config
    assert read_checkpoint(converted).config == (replace(config, label=case) if case == "separate" else config)
    folders = (converted, checkpoint)
    found, wanted = (contents(runs.evaluate(folder, tmp_path / f"{folder.name}-run")) for folder in folders)
    tables = {name for name in wanted if name.endswith((".csv", ".jsonl"))} - {"events.jsonl"}
    assert "matrix.csv" in tables and ("locator.csv" in tables) == (case != "separate")
    assert {name: found[name] for name in tables} == {name: wanted[name] for name in tables}


def test_a_damaged_file_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "old"
    seal_as_0_1(runs.chain("lora")[0], "separate", old)
    content = bytearray((old / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (old / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(SystemExit):
        main(["convert", str(old), str(tmp_path / "new")])
    assert f"{old}/adapter_model.safetensors" in capsys.readouterr().err and not (tmp_path / "new").exists()
