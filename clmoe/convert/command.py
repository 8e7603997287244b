"""``clmoe convert``: another project's model or adapter -> ours."""

from argparse import Namespace
from pathlib import Path

from clmoe.benchmarks.base import load_benchmark
from clmoe.convert.legacy_adapters import convert_adapter
from clmoe.convert.old_checkpoint import convert_old_checkpoint, is_old_checkpoint
from clmoe.convert.weights import convert_liuhaotian, convert_vicuna
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json

LIUHAOTIAN, LLAMA, ADAPTER = "an original LLaVA", "a LLaMA or Vicuna", "an adapter of CoIN or CL-MoE"
OLD = "a checkpoint that clmoe 0.1 sealed"
NEEDED = {LIUHAOTIAN: {"vision"}, LLAMA: {"vision", "projector"}, ADAPTER: {"model", "benchmark", "tasks"}, OLD: set()}
"""The options that each format needs; it takes no others."""


def convert_any(options: Namespace) -> str:
    """Convert SRC to DST; return what was found and written."""
    source, target = options.source, options.target
    kind = detect(source)
    for name in ("vision", "projector", "model", "benchmark", "tasks"):
        needed, given = name in NEEDED[kind], getattr(options, name) is not None
        if needed != given:
            raise ClmoeError(f"{source} is {kind}: " + (f"give --{name} as well" if needed else f"leave out --{name}"))
    if target.exists():
        raise ClmoeError(f"{target} exists: choose another folder or delete it")
    if kind == LIUHAOTIAN:
        found = convert_liuhaotian(source, target, options.vision)
    elif kind == LLAMA:
        found = convert_vicuna(source, target, options.vision, options.projector)
    elif kind == OLD:
        found = convert_old_checkpoint(source, target)
    else:
        benchmark = load_benchmark(options.benchmark, None, check_files=False)
        found = convert_adapter(source, target, options.model, benchmark, options.tasks)
    return f"{found}\nwritten and read back: {target}"


def detect(folder: Path) -> str:
    """What a folder holds. Raises ClmoeError for an unknown format, or one that needs no conversion."""
    if is_old_checkpoint(folder):
        return OLD
    if (folder / "adapter_config.json").is_file():
        return ADAPTER
    values = read_json(folder / "config.json")
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind in ("llava", "llava_llama") and "text_config" not in values:
        return LIUHAOTIAN
    if kind == "llama":
        return LLAMA
    if kind == "llava":
        raise ClmoeError(f"{folder} is in transformers' format already: give it as --model without converting it")
    known = f"{LIUHAOTIAN} (llava), {LLAMA} (llama), or {ADAPTER} (adapter_config.json)"
    raise ClmoeError(f"{folder / 'config.json'}: model_type is {kind!r}; expected {known}")
