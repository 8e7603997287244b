"""``clmoe convert``: another project's model or adapter, or a checkpoint that clmoe 0.1 sealed (format 1) -> ours."""

import copy
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from clmoe.benchmarks.base import load_benchmark
from clmoe.config import Config, build, dump_config, read_yaml
from clmoe.convert.legacy_adapters import convert_adapter
from clmoe.convert.weights import convert_liuhaotian, convert_vicuna
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.methods.base import EXPANSION
from clmoe.train.checkpoint import CONFIG, LINEAGE, MANIFEST, OLD_FORMAT, build_folder
from clmoe.utils.files import file_sha256, read_json, write_json
from clmoe.utils.tensors import load_tensors

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
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).is_file() else None
    if isinstance(manifest, dict) and manifest.get("format_version") == OLD_FORMAT:
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


# ---- Checkpoints of clmoe 0.1: the same tensors, settings under their new names

OLD_BANK = {"vae": LOCATOR_FILE, "prototype": "prototypes.safetensors"}  # LLaVA-CMoE kept two locators
DROPPED = (MANIFEST, "README.md", CONFIG, LINEAGE, *OLD_BANK.values())


def convert_old_checkpoint(source: Path, target: Path) -> str:
    """Return what it was. Raises ClmoeError: a file is missing or damaged, or a setting has no counterpart."""
    files = read_json(source / MANIFEST)["files"]
    for name, entry in files.items():
        if not (source / name).is_file() or file_sha256(source / name) != entry["sha256"]:
            raise ClmoeError(f"{source / name} is missing or damaged: restore it")
    values, bank = _upgraded(read_yaml(source / CONFIG))
    config = build(Config, values, str(source / CONFIG))

    def fill(folder: Path) -> None:
        for name in files.keys() - set(DROPPED):
            shutil.copy(source / name, folder / (EXPANSION if name == "plan.json" else name))
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        lineage = read_json(source / LINEAGE) | {"method": config.method}
        lineage.pop("config_sha256", None)  # of the settings under their old names
        write_json(folder / LINEAGE, lineage)
        if bank is not None:
            locator = make_locator(config.locator, config.seed)
            locator.load_state(load_tensors(source / bank))
            locator.save(folder / LOCATOR_FILE)

    build_folder(target, fill)
    return f"a checkpoint of {config.name} that clmoe 0.1 sealed"


def _upgraded(old: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Settings under today's names, and the file that holds the locator, if the method has one."""
    values = copy.deepcopy(old)
    options, method = values["options"], values["method"]
    values["adapter"].pop("budget", None)
    if method == "separate":  # a plain LoRA that had learned one task
        values |= {"method": "lora", "label": values["label"] or "separate"}
    if method not in ("clmoe", "llava_cmoe"):
        return values, None
    name = "prototype" if method == "clmoe" else options.pop("decider", "vae")
    locator = {"name": name, "feature": options.pop("feature", "last"), "samples": options.get("samples", 2000)}
    if method == "clmoe":
        own, bank = {key: options.pop(key) for key in ("distance", "radius") if key in options}, LOCATOR_FILE
    else:
        options.pop("samples", None)
        vae, bank = options.pop("locator", {}), OLD_BANK[name]
        own = vae if name == "vae" else {}
    values["locator"] = locator | {"options": own}
    return values, bank
