"""``clmoe export`` writes a hub folder whose card's code runs, or a base with the updates added to its weights."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from clmoe.bases.llava import LoadedBase, load_base
from clmoe.bases.stack import tower_names
from clmoe.cli import main
from clmoe.config import ModelConfig
from clmoe.convert.merge import place_in
from clmoe.errors import ClmoeError
from clmoe.experts.model import load_adapter
from clmoe.experts.routing import RouteSelection, routing
from clmoe.report.card import metadata
from clmoe.train.checkpoint import read_checkpoint, verify
from tests.report.folders import make_run
from tests.runs import Runs, contents, tensors
from tests.support import TASKS, prompt_batch

SEPARATE = ("adapter.train_projector=false",)


def logits(model: Any, base: LoadedBase, **selection: Tensor) -> Tensor:
    with torch.no_grad(), routing(RouteSelection(**selection)):
        return model.eval()(**prompt_batch(base, ["What is it?", "Which colour is it?"])).logits


def by_hand(checkpoint: Path, name: str, weight: Tensor) -> Tensor:
    """A weight of the base, by its name in the base's file, with the updates of every task added, in float64."""
    config, saved = read_checkpoint(checkpoint).config, tensors(checkpoint)
    if name.startswith("multi_modal_projector."):
        return saved[f"base_model.model.model.{name}"].double()
    linear = name.replace("language_model.model.", "base_model.model.model.language_model.").removesuffix(".weight")
    assert config.adapter.scale is not None
    experts = f".clmoe_experts.{linear.rpartition('.')[2]}."
    for part in (".lora_{}.weight", experts + "frozen_{}", experts + "{}"):
        if linear + part.format("A") in saved:
            A, B = (saved[linear + part.format(factor)].double() for factor in "AB")
            weight = weight.double() + config.adapter.scale * B @ A
    return weight.double()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "olora"])
def test_a_merged_base_is_the_adapted_one(method: str, runs: Runs, tiny_base: LoadedBase, tmp_path: Path) -> None:
    """Each merged weight is W + s B A written out, and the merged model gives the logits of adapter and base."""
    checkpoint = runs.chain(method)[-1]
    main(["export", str(checkpoint), str(tmp_path / "merged"), "--merge"])
    before, after = (load_file(folder / "model.safetensors") for folder in (runs.model, tmp_path / "merged"))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    kinds = {re.sub(r"\d+", "N", name.removesuffix(".weight").removesuffix(".bias")) for name in changed}
    ffn = {f"language_model.model.layers.N.mlp.{name}_proj" for name in ("gate", "up", "down")}
    assert kinds == ffn | {"multi_modal_projector.linear_N"}
    for name in changed:
        torch.testing.assert_close(after[name].double(), by_hand(checkpoint, name, before[name]), rtol=1e-6, atol=1e-7)
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged", **tower_names("llava"))
    plain, found = logits(tiny_base.model, tiny_base), logits(stock, tiny_base)
    torch.testing.assert_close(found, logits(load_adapter(tiny_base.model, checkpoint, False), tiny_base))
    assert (found - plain).abs().max() > 1e-2
    opened = load_base(ModelConfig(path=str(tmp_path / "merged")))
    assert opened.tokenizer("What is it?").input_ids == tiny_base.tokenizer("What is it?").input_ids
    assert "library_name: transformers" in (tmp_path / "merged" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "clmoe"])
def test_the_code_of_a_card_loads_what_was_exported(
    method: str, runs: Runs, new_base: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path, method, 0, order=list(TASKS))
    checkpoint = runs.copy(runs.chain(method)[-1], run / "02_count")
    main(["export", str(checkpoint), str(tmp_path / "hub")])
    written = contents(tmp_path / "hub")
    card = written.pop("README.md").decode()
    assert written == contents(checkpoint) and verify(tmp_path / "hub") == verify(checkpoint)
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["library_name"] == "peft" and "base_model" not in fields, "its base is a folder"
    assert f"| {TASKS[0]} | 80.00 | – |\n| {TASKS[1]} | 70.00 | 80.00 |\n\nlast 75.00" in card and TASKS[2] not in card
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (20, 20)).save("photo.png")
    with_peft, with_clmoe = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert ("import clmoe" in with_peft) == (method == "clmoe")
    names: dict[str, Any] = {}
    exec(with_peft, names)
    base, one = new_base(), torch.ones(2, dtype=torch.int64)
    selection = {"task": one} if method == "clmoe" else {}
    expected = logits(load_adapter(base.model, checkpoint, False), base, **selection)
    assert torch.equal(logits(names["model"], base, **selection), expected)
    exec(with_clmoe, {})


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), [("clmoe", ()), ("separate", SEPARATE)])
def test_what_cannot_be_merged_is_one_line(
    method: str, settings: tuple[str, ...], runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = runs.chain(method, *settings, tasks=TASKS[:1])[0]
    with pytest.raises(SystemExit):
        main(["export", str(checkpoint), str(tmp_path / "merged"), "--merge"])
    assert re.fullmatch(rf"clmoe export: .*{method} cannot be merged: .*--merge\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_another_base_or_a_folder_in_use_is_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint,) = runs.chain("lora", tasks=TASKS[:1])
    other = Path(shutil.copytree(runs.model, tmp_path / "other"))
    (other / "config.json").write_text((other / "config.json").read_text() + " ")
    for target, options in (
        ("merged", ["--base", str(other)]),
        ("other", []),
        ("other/inside", ["--base", str(other)]),
    ):
        before = contents(tmp_path)
        with pytest.raises(SystemExit):
            main(["export", str(checkpoint), str(tmp_path / target), "--merge", *options])
        assert str(other) in capsys.readouterr().err and contents(tmp_path) == before


LAYER = "layers.3.mlp.up_proj.weight"


@pytest.mark.parametrize(
    "there",
    ["language_model.model." + LAYER, "model.language_model." + LAYER, "model." + LAYER],
    ids=["llava-hf", "as in memory", "Qwen2-VL"],
)
def test_a_parameter_is_found_under_its_name_in_the_files(there: str) -> None:
    name = f"model.language_model.{LAYER}"
    shapes = dict.fromkeys([there, f"visual.{LAYER.replace('layers', 'blocks')}", "visual.up_proj.weight"], (4, 3))
    shapes |= {there.replace("3", "13"): (4, 3), there.replace("up", "down"): (3, 4), "vision_tower." + LAYER: (8, 3)}
    assert place_in(shapes, name, (4, 3)) == there
    with pytest.raises(ClmoeError, match=re.escape(name)):
        place_in(shapes, name, (5, 5))
    with pytest.raises(ClmoeError, match="clearly"):
        place_in({"one." + LAYER: (4, 3), "two." + LAYER: (4, 3)}, name, (4, 3))


def test_only_a_name_of_the_hub_is_a_base_model(tmp_path: Path) -> None:
    assert metadata("llava-hf/llava-1.5-7b-hf", False)["base_model"] == "llava-hf/llava-1.5-7b-hf"
    assert "base_model" not in metadata(str(tmp_path), False)
