"""A checkpoint that clmoe 0.1 sealed (format 1) -> one of today's: the same tensors, settings under their new names."""

import copy
import shutil
from pathlib import Path
from typing import Any

from clmoe.config import Config, build, dump_config, read_yaml
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.methods.base import EXPANSION
from clmoe.train.checkpoint import CONFIG, LINEAGE, MANIFEST, OLD_FORMAT, build_folder
from clmoe.utils.files import file_sha256, read_json, write_json
from clmoe.utils.tensors import load_tensors

OLD_BANK = {"vae": LOCATOR_FILE, "prototype": "prototypes.safetensors"}
"""LLaVA-CMoE kept two locators: the file of each."""

DROPPED = (MANIFEST, "README.md", CONFIG, LINEAGE, *OLD_BANK.values())


def is_old_checkpoint(folder: Path) -> bool:
    """True for a folder that clmoe 0.1 sealed."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("format_version") == OLD_FORMAT


def convert_old_checkpoint(source: Path, target: Path) -> str:
    """Write ``source`` anew as ``target``; return what it was.

    Raises ClmoeError: a file is missing or damaged, or a setting has no counterpart.
    """
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
