"""The model card: what the hub reads, code that runs as printed, scores of this very checkpoint."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import clmoe
from clmoe import cli
from clmoe.errors import ClmoeError
from clmoe.train.card import base_name
from clmoe.train.checkpoint import verify
from clmoe.train.lineage import read_checkpoint
from tests.runs import Runs
from tests.support import TASKS

WRITE_BACK = """
from clmoe.model.adapter import adapter_tensors
from safetensors.torch import save_file
save_file({name: tensor.contiguous() for name, tensor in adapter_tensors(model).items()}, "loaded.safetensors")
"""


@pytest.mark.parametrize("method", ["lora", "clmoe"])
def test_the_hub_reads_its_head(method: str, runs: Runs) -> None:
    checkpoint = runs.chain(method)[1]
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.to_dict() == {
        "base_model": runs.model.name,
        "datasets": ["mini"],
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": ["clmoe", "continual-learning", "llava", "lora"],
    }
    assert re.findall(r"^\d+\. (.*)$", card.text, re.MULTILINE) == list(TASKS[:2])
    assert str(runs.model.parent) not in card.text
    assert f"parameters trained on it | {read_checkpoint(checkpoint).lineage.trainable_parameters:,} |" in card.text


def test_its_code_runs_as_printed(runs: Runs, mini_yaml: Path, tmp_path: Path) -> None:
    """In a folder that holds what the card says: the checkpoint and the base, by their names."""
    source = runs.chain("clmoe")[1]
    runs.copy(source, tmp_path / "checkpoint")
    (tmp_path / runs.model.name).symlink_to(runs.model)
    image = mini_yaml.parent / "colour" / "images" / "3.png"
    (tmp_path / "photo.png").write_bytes(image.read_bytes())
    blocks = re.findall(r"```python\n(.*?)```", (tmp_path / "checkpoint" / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 2
    code = "\n".join(blocks) + WRITE_BACK
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == clmoe.load(source).answer(image, "What is in the image?")
    saved, loaded = (load_file(f) for f in (source / "adapter_model.safetensors", tmp_path / "loaded.safetensors"))
    assert saved.keys() == loaded.keys()
    assert all(saved[name].equal(loaded[name]) for name in saved)


def test_what_the_hub_adds_and_a_new_card_do_no_harm(runs: Runs, tmp_path: Path) -> None:
    source = runs.chain("clmoe")[0]
    copy = runs.copy(source, tmp_path / "downloaded")
    (copy / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (copy / ".cache" / "huggingface").mkdir(parents=True)
    (copy / ".cache" / "huggingface" / "state.json").write_text("{}")
    (copy / "README.md").write_text("# My model\n")
    assert verify(copy) == verify(source)
    (copy / "README.md").unlink()
    assert verify(copy) == verify(source)
    (copy / "notes.txt").write_text("x")
    with pytest.raises(ClmoeError, match=r"notes\.txt is not in the manifest"):
        verify(copy)


def test_the_scores_are_those_of_the_run(runs: Runs, tmp_path: Path) -> None:
    first, second = runs.chain("clmoe")
    order = ",".join(TASKS[:2])
    for checkpoint in (first, second):
        runs.evaluate(checkpoint, tmp_path / "run", order=order)
    last = runs.copy(second, tmp_path / "run" / "02_count")
    written = (last / "README.md").read_text()
    assert "clmoe card" in written
    cli.main(["card", str(last)])
    text = (last / "README.md").read_text()
    for task in TASKS[:2]:
        lines = (tmp_path / "run" / "predictions" / TASKS[1] / f"{task}.jsonl").read_text().splitlines()
        right = [json.loads(line)["score"] for line in lines]
        assert f"| {task} | 12 | {100 * sum(right) / 12:.2f} |" in text
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert f"| bwt_n | {metrics['bwt_n']:.2f} |" in text
    assert "None" not in text
    assert verify(last) == verify(second)
    head, tail = written.split("## Scores")[0], written.split("## Training")[1]
    assert text.startswith(head)
    assert text.endswith(tail)


def test_scores_of_another_checkpoint_are_refused(runs: Runs, tmp_path: Path) -> None:
    first, second = runs.chain("clmoe")
    run = runs.evaluate(first, tmp_path / "run")
    done = read_checkpoint(second)
    from clmoe.report.card import measured_scores

    with pytest.raises(ClmoeError, match="does not exist: evaluate with"):
        measured_scores(done, run)
    other = runs.chain("clmoe", "options.gamma=0.5")[0]
    with pytest.raises(ClmoeError, match="was measured on another checkpoint"):
        measured_scores(read_checkpoint(other), run)


@pytest.mark.parametrize(
    ("path", "name"),
    [("llava-hf/llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"), ("playground/base", "playground/base")]
    + [(path, "llava") for path in ("/data/llava", "~/llava", "./x/llava", "../llava")],
)
def test_a_card_names_no_folder_of_this_machine(path: str, name: str) -> None:
    assert base_name(path) == name


def test_the_base_may_lie_elsewhere(runs: Runs, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(runs.model)
    checkpoint = runs.chain("clmoe")[0]
    assert clmoe.load(checkpoint, model=str(moved)).answerer.method.config.model.path == str(moved)
    with pytest.raises(ClmoeError, match="no such folder"):
        clmoe.load(checkpoint, model=str(tmp_path / "nowhere"))
