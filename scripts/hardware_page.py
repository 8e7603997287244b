"""Write the table of docs/hardware.md: what `--fit` chooses for each card, size and method, and what `clmoe plan` says.

python scripts/hardware_page.py
"""

from __future__ import annotations

import re
from pathlib import Path

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import load_config
from clmoe.methods import method_class
from clmoe.plan import make_plan
from clmoe.plan.cost import card
from clmoe.plan.fit import fit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "hardware.md"
SETUPS = {"1 x 24 GB": ("24GB", 1, None), "1 x 80 GB": ("A100", 1, None), "8 x 80 GB": ("A100", 8, "zero2")}
MODELS = ("llava-1.5-7b", "llava-1.5-13b")
METHODS = ("lora", "olora", "moelora", "clmoe", "clmoe_released", "llava_cmoe")
SHORT = {
    "training.micro_batch_size=": "micro-batch ", "training.gradient_checkpointing=true": "checkpointing",
    "model.load_in_8bit=true": "8 bits", "model.load_in_4bit=true": "4 bits", "evaluation.batch_size=": "answers ",
}  # fmt: skip
HEAD = """\
| cards | model | method | `--fit` chooses | peak, GiB | fits | hours for 100,000 records | for 100,000 answers |
|---|---|---|---|---:|---|---:|---:|
"""


def row(setup: str, model: str, name: str) -> str:
    """One line of the table."""
    text, gpus, deepspeed = SETUPS[setup]
    benchmark = load_benchmark("coin", check_files=False)
    config = load_config(name, benchmark.recipe, [], model)
    found = fit(config, [], card(text), gpus, deepspeed)
    config = load_config(name, benchmark.recipe, found.settings, model)
    order = [benchmark.tasks[0].name]
    values = make_plan(method_class(config.method)(config), benchmark, order, gpus, found.deepspeed, card=card(text))
    chosen = [*found.settings, *([] if found.deepspeed == deepspeed else [f"--deepspeed {found.deepspeed}"])]
    shown = ", ".join(chosen) or "nothing"
    for long, short in SHORT.items():
        shown = shown.replace(long, short)
    hours = [values["card"]["hours"][f"100,000 {kind}"] for kind in ("records", "answers")]
    peak, fits = values["memory"]["total"] / 2**30, "yes" if values["card"]["fits"] else "no"
    cells = (
        setup,
        model.removeprefix("llava-1.5-"),
        f"`{name}`",
        shown,
        f"{peak:.1f}",
        fits,
        *map("{:.1f}".format, hours),
    )
    return f"| {' | '.join(cells)} |\n"


def table() -> str:
    return HEAD + "".join(row(setup, model, name) for setup in SETUPS for model in MODELS for name in METHODS)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(re.sub(r"^\| cards .*?\n(?!\|)", lambda _: table(), text, flags=re.MULTILINE | re.DOTALL), "utf-8")
