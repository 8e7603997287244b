"""Write the tables of docs/hardware.md: what `--fit` chooses for each card and size, and what `clmoe plan` says.

python scripts/hardware_page.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
# Published values of config.json; what is left out is transformers' default for the model_type.
QWEN_7B = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
QWEN_7B |= {"num_key_value_heads": 4, "vocab_size": 152064}
SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
SIGLIP |= {"patch_size": 14, "vision_use_head": False}
QWEN_TOWER = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
TEXT_3B = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16}
TEXT_3B |= {"num_key_value_heads": 2, "vocab_size": 151936}
GEMMA_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "num_attention_heads": 8}
GEMMA_4B |= {"num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208, "model_type": "gemma3_text"}
SMOL_TEXT = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
SMOL_TEXT |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49280}
BASES: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-3B": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": True,
        "text_config": TEXT_3B, "vision_config": QWEN_TOWER | {"out_hidden_size": 2048},
    },
    "Qwen2.5-VL-7B": {
        "model_type": "qwen2_5_vl", "tie_word_embeddings": False,
        "text_config": QWEN_7B, "vision_config": QWEN_TOWER | {"out_hidden_size": 3584},
    },
    "InternVL3-8B": {
        "model_type": "internvl", "tie_word_embeddings": False,
        "text_config": QWEN_7B | {"model_type": "qwen2", "vocab_size": 151674},
        "vision_config": {"hidden_size": 1024, "num_hidden_layers": 24, "intermediate_size": 4096},
    },
    "LLaVA-OneVision-7B": {
        "model_type": "llava_onevision", "tie_word_embeddings": False,
        "text_config": QWEN_7B | {"model_type": "qwen2", "vocab_size": 152000},
        "vision_config": SIGLIP | {"model_type": "siglip_vision_model", "num_hidden_layers": 26, "image_size": 384},
    },
    "Gemma-3-4B": {
        "model_type": "gemma3", "tie_word_embeddings": True, "mm_tokens_per_image": 256,
        "text_config": GEMMA_4B, "vision_config": SIGLIP | {"model_type": "siglip_vision_model", "image_size": 896},
    },
    "SmolVLM2-2.2B": {
        "model_type": "smolvlm", "tie_word_embeddings": False, "scale_factor": 3,
        "text_config": SMOL_TEXT, "vision_config": SIGLIP | {"model_type": "smolvlm_vision", "image_size": 384},
    },
}  # fmt: skip
HEAD = """\
| cards | model | method | `--fit` chooses | peak, GiB | fits | hours for 100,000 records | for 100,000 answers |
|---|---|---|---|---:|---|---:|---:|
"""

BASES_HEAD = """\
| base | parameters, M | image, tokens | card | `--fit` chooses | peak, GiB | fits | hours for 100,000 records |
|---|---:|---:|---|---|---:|---|---:|
"""


def base_row(name: str, size: str) -> str:
    """One line of the table of other bases: `clmoe`, an image of 640 x 480 pixels, on one card."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(BASES[name]))
        settings = ["model.dtype=bfloat16", "training.max_length=4096"]
        values, shown = planned("clmoe", folder, settings, size, 1, None)
    millions = f"{values['base_parameters'] / 1e6:,.0f}"
    figures = [f"{values['memory']['total'] / 2**30:.1f}", "yes" if values["card"]["fits"] else "no"]
    cells = [name, millions, f"{values['image']['tokens']:,}", size, shown, *figures]
    return f"| {' | '.join(cells)} | {values['card']['hours']['100,000 records']:.1f} |\n"


def row(setup: str, model: str, name: str) -> str:
    """One line of the table."""
    values, shown = planned(name, model, [], *SETUPS[setup])
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


def planned(
    name: str, model: str, settings: list[str], size: str, gpus: int, deepspeed: str | None
) -> tuple[dict[str, Any], str]:
    """``make_plan``'s figures with what ``--fit`` chooses, and that choice in short."""
    benchmark = load_benchmark("coin", check_files=False)
    config = load_config(name, benchmark.recipe, settings, model)
    found = fit(config, settings, card(size), gpus, deepspeed)
    config = load_config(name, benchmark.recipe, [*settings, *found.settings], model)
    order = [benchmark.tasks[0].name]
    values = make_plan(method_class(config.method)(config), benchmark, order, gpus, found.deepspeed, card=card(size))
    chosen = [*found.settings, *([] if found.deepspeed == deepspeed else [f"--deepspeed {found.deepspeed}"])]
    shown = ", ".join(chosen) or "nothing"
    for long, short in SHORT.items():
        shown = shown.replace(long, short)
    return values, shown


def bases_table() -> str:
    return BASES_HEAD + "".join(base_row(name, size) for name in BASES for size in ("24GB", "A100"))


def table() -> str:
    return HEAD + "".join(row(setup, model, name) for setup in SETUPS for model in MODELS for name in METHODS)


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    for first, made in (("cards", table), ("base", bases_table)):
        pattern = rf"^\| {first} .*?\n(?!\|)"
        text = re.sub(pattern, lambda _, made=made: made(), text, count=1, flags=re.MULTILINE | re.DOTALL)
    PAGE.write_text(text, "utf-8")
