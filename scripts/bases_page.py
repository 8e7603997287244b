"""Write the table of docs/bases.md: ``python scripts/bases_page.py`` runs the contract of every family of bases.

A cell says how many checks of its column passed, out of how many; one that fails or is skipped is named too. Every
method and every locator is tried on every family, which takes minutes.
"""

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

import peft
import torch
import transformers

from clmoe.bases.families import FAMILIES

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "bases.md"
SUITE = "tests/bases/test_families.py"
BEGIN, END = "<!-- written by scripts/bases_page.py -->\n", "<!-- end -->\n"
COLUMNS = {
    "inputs": ("labels_are_exactly", "what_a_length", "text_that_holds", "a_processor_with"),
    "train": ("adapters_are_on", "a_soft_token", "a_batch_of_records", "training_reads", "a_tuned_projector"),
    "methods": ("two_tasks",),
    "resume": ("a_killed_training",),
    "evaluate": ("answers_are_those", "an_answer_ends", "a_batch_of_prompts"),
    "locate": ("features_for_locators", "an_images_embedding"),
    "locators": ("a_locator_finds",),
    "compile": ("an_adapted_ffn",),
    "checkpointing": ("recomputed_activations",),
}
"""How the tests' names begin."""


def outcomes(suite: Path) -> dict[tuple[str, str], list[str]]:
    """By family and column: what became of each check."""
    found: dict[tuple[str, str], list[str]] = {(f, c): [] for f in FAMILIES for c in COLUMNS}
    for case in ET.parse(suite).iter("testcase"):
        name, _, parameters = str(case.get("name")).removesuffix("]").partition("[")
        families = [part for part in parameters.split("-") if part in FAMILIES]
        columns = [c for c, names in COLUMNS.items() if name.removeprefix("test_").startswith(names)]
        if len(families) != 1 or len(columns) != 1:
            raise SystemExit(f"{case.get('name')}: COLUMNS must name it once, and a family must be in its parameters")
        bad = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "")
        found[families[0], columns[0]].append(f"{bad}: {name}[{parameters}]" if bad else "")
    return found


def table(found: dict[tuple[str, str], list[str]]) -> str:
    lines = [f"| family | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family in FAMILIES:
        cells = []
        for column in COLUMNS:
            results = found[family, column]
            bad = sorted({text for text in results if text})
            cells.append(", ".join([f"{results.count('')} of {len(results)}", *bad]))
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", SUITE, f"--junitxml={report}"]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "CLMOE_EVERY_PAIR": "1"}, check=False).returncode
        found = outcomes(report)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, peft {peft.__version__}"
    python = ".".join(map(str, sys.version_info[:2]))
    made = f"{BEGIN}\n{table(found)}\nMeasured with Python {python}, {versions}.\n\n{END}"
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: made, text, flags=re.DOTALL), encoding="utf-8")
    return code


if __name__ == "__main__":
    sys.exit(main())
