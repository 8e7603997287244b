"""Which of the known formats a folder holds, told from its files."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Literal

from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

Format = Literal["liuhaotian", "llama", "adapter"]
KNOWN = (
    "an original LLaVA (config.json with mm_projector_type), a LLaMA or Vicuna (model_type llama), or an adapter of "
    "CoIN or CL-MoE (adapter_config.json and adapter_model.bin)"
)


def detect(folder: Path) -> Format:
    """The format of a folder.

    Raises:
        ClmoeError: none of them, or one that needs no conversion.
    """
    if not folder.is_dir():
        raise ClmoeError(f"{folder}: no such folder")
    if (folder / "adapter_config.json").is_file():
        return "adapter"
    if not (folder / "config.json").is_file():
        raise ClmoeError(f"{folder}: neither config.json nor adapter_config.json in it; expected {KNOWN}")
    values = read_json(folder / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind in ("llava", "llava_llama") and "text_config" not in values:
        return "liuhaotian"
    if kind == "llama":
        return "llama"
    if kind == "llava":
        raise ClmoeError(f"{folder} is in transformers' format already: give it as --model, it needs no conversion")
    raise ClmoeError(f"{folder}: model_type {kind!r} in its config.json; expected {KNOWN}")


# what each format takes, and of that what it cannot do without
OPTIONS: dict[Format, tuple[set[str], set[str]]] = {
    "liuhaotian": ({"vision"}, set()),
    "llama": ({"vision", "projector"}, {"vision", "projector"}),
    "adapter": ({"model", "benchmark", "tasks"}, {"model", "benchmark", "tasks"}),
}
NAMES = {
    "liuhaotian": "an original LLaVA, with a projector of its own",
    "llama": "a language model alone",
    "adapter": "an adapter",
}


def check_options(kind: Format, source: Path, options: Namespace) -> None:
    """The command line gives what this format needs and nothing that it would not use.

    Raises:
        ClmoeError: it does not; the option is named.
    """
    taken, needed = OPTIONS[kind]
    for name in ("vision", "projector", "model", "benchmark", "tasks"):
        given = getattr(options, name) is not None
        if given and name not in taken:
            raise ClmoeError(f"{source} is {NAMES[kind]}: leave out --{name}")
        if name in needed and not given:
            raise ClmoeError(f"{source} is {NAMES[kind]}: give --{name} as well")
