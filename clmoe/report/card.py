"""The model card of an exported checkpoint: what it is, what it scored, and how it is loaded."""

from pathlib import Path

import yaml

from clmoe.evaluate.matrix import ZERO_SHOT, AccuracyMatrix, metrics
from clmoe.report.runs import read_run
from clmoe.report.tables import Table, matrix_frame, show_count, show_number, to_markdown
from clmoe.train.checkpoint import Finished
from clmoe.utils.files import read_json
from clmoe.utils.paths import resolve_model_path

MERGED = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{folder}")
processor = AutoProcessor.from_pretrained("{folder}")
"""
ADAPTER = """{import_clmoe}from peft import PeftModel
from transformers import AutoModelForImageTextToText

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{folder}").eval()
"""
CLMOE = """import clmoe

model = clmoe.load("{folder}", model="{base}")
print(model.answer("photo.png", "What is this?"))
"""


def model_card(done: Finished, folder: str, merged: bool) -> str:
    """README.md of a checkpoint that lies in ``folder``: the hub's metadata in YAML, then Markdown.

    The scores are those of the run that the checkpoint belongs to, if it is still there. Raises ClmoeError as
    ``read_run`` does.
    """
    lineage, config, base = done.lineage, done.config, done.config.model.path
    trained = f"{len(lineage.tasks)} task{'s' if len(lineage.tasks) > 1 else ''} of {lineage.benchmark}"
    versions = ", ".join(f"{name} {version}" for name, version in lineage.versions.items())
    facts = {
        "base": f"`{base}`, sha256 of its configuration and a sample of its weights {lineage.base}",
        "method": f"`{lineage.method}` of clmoe, seed {lineage.seed}",
        "tasks, oldest first": ", ".join(lineage.tasks),
        "steps of the last task": f"{lineage.steps:,}, each of {config.training.batch_size} samples",
        "parameters": f"{show_count(lineage.trainable_parameters)} trained in the last task, "
        f"{show_count(lineage.adapter_parameters)} in the adapter",
        "made with": versions,
    }
    parts = [
        f"---\n{yaml.safe_dump(metadata(base, merged), sort_keys=False)}---",
        f"# {config.name} on {lineage.benchmark}, after {lineage.tasks[-1]}",
        f"{'The base with the updates of' if merged else 'An adapter that has learned'} {trained}, one after another.",
        "\n".join(f"- {name}: {fact}" for name, fact in facts.items()),
        "## Scores",
        _scores(done),
        "## Use",
        *_use(done, folder, merged),
    ]
    return "\n\n".join(parts) + "\n"


def metadata(base: str, merged: bool) -> dict[str, object]:
    """The hub's fields. ``base_model`` must be a name there, which a folder's is not."""
    fields: dict[str, object] = {"library_name": "transformers" if merged else "peft"}
    if not Path(resolve_model_path(base)).is_dir():
        fields |= {"base_model": base, "base_model_relation": "finetune" if merged else "adapter"}
    tags = ["clmoe", "continual-learning", "visual-question-answering"]
    return fields | {"pipeline_tag": "image-text-to-text", "tags": tags}


def _scores(done: Finished) -> str:
    """The accuracy matrix up to this checkpoint, and its metrics."""
    run, tasks = done.folder.resolve().parent, tuple(done.lineage.tasks)
    read = read_run(run) if (run / "run.json").is_file() else None
    if read is None or tuple(read.order[: len(tasks)]) != tasks:
        return "Not evaluated."
    stages = [after for after in read.matrix.rows if after in (ZERO_SHOT, *tasks)]
    matrix = AccuracyMatrix(tasks, {after: read.matrix.row(after)[: len(tasks)] for after in stages})
    cells = matrix_frame(read).loc[stages, list(tasks)].map(show_number).reset_index()
    table = to_markdown(Table("Scores", cells, keys=len(cells.columns)))
    found = [f"{name} {value:.2f}" for name, value in metrics(matrix).items() if value is not None]
    return f"Percent, after each task (rows) on each task (columns).\n\n{table}\n\n{', '.join(found)}"


def _use(done: Finished, folder: str, merged: bool) -> list[str]:
    """Code that loads the folder, and what its user must know."""
    model, values = done.config.model, read_json(done.folder / "adapter_config.json")
    if merged:
        rounded = "The adapter was trained on a 4-bit base and added to the whole one, so answers may differ a little."
        return [f"```python\n{MERGED.format(folder=folder)}```", *([rounded] if model.load_in_4bit else [])]
    plain, names = values["peft_type"] == "LORA", {"folder": folder, "base": model.path}
    import_clmoe = "" if plain else "import clmoe  # teaches peft this kind of adapter\n"
    routed = "" if plain else " Where answers depend on the task, choose it with `clmoe.routing(...)`."
    return [
        f"With peft.{routed}",
        f"```python\n{ADAPTER.format(import_clmoe=import_clmoe, **names)}```",
        "With clmoe, which also finds the task of a question where answers depend on it.",
        f"```python\n{CLMOE.format(**names)}```",
    ]
