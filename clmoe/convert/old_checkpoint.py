"""A checkpoint that clmoe 0.1 sealed (format 1) -> one of today's: the same tensors, settings under their new names."""

import shutil
from pathlib import Path
from typing import Any

import yaml

from clmoe.config import Config, build, dump_config, read_yaml
from clmoe.errors import ClmoeError
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.train.checkpoint import CONFIG, LINEAGE, MANIFEST, OLD_FORMAT, build_folder, training_identity
from clmoe.utils.files import file_sha256, read_json, write_json
from clmoe.utils.tensors import load_tensors

DROPPED = (MANIFEST, "README.md", "prototypes.safetensors", CONFIG, LINEAGE, LOCATOR_FILE)
OLD_BANK = {"vae": LOCATOR_FILE, "prototype": "prototypes.safetensors"}
"""LLaVA-CMoE kept two locators: the file of each."""


def is_old_checkpoint(folder: Path) -> bool:
    """True for a folder that clmoe 0.1 sealed."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("format_version") == OLD_FORMAT


def convert_old_checkpoint(source: Path, target: Path) -> str:
    """Write ``source`` anew as ``target``; returns what was done.

    Raises:
        ClmoeError: a file of the old checkpoint is missing or damaged, or a setting has no counterpart.
    """
    for name, entry in read_json(source / MANIFEST)["files"].items():
        if not (source / name).is_file() or file_sha256(source / name) != entry["sha256"]:
            raise ClmoeError(f"{source / name} is missing or damaged: restore it")
    values, bank = _upgraded(read_yaml(source / CONFIG))
    config = build(Config, values, str(source / CONFIG))

    def fill(folder: Path) -> None:
        for path in source.iterdir():
            if path.is_file() and path.name not in DROPPED:
                shutil.copy(path, folder / path.name)
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        lineage = read_json(source / LINEAGE)
        lineage |= {"config_sha256": training_identity(config), "method": config.method}
        write_json(folder / LINEAGE, lineage)
        if bank is not None:
            locator = make_locator(config.locator, config.seed)
            locator.load_state(load_tensors(source / bank))
            locator.save(folder / LOCATOR_FILE)

    build_folder(target, fill)
    return f"a checkpoint of {config.name} that clmoe 0.1 sealed"


def _upgraded(values: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """Settings under today's names, and the old file that holds the locator."""
    values = yaml.safe_load(yaml.safe_dump(values))
    options, method = values["options"], values["method"]
    values["adapter"].pop("budget", None)
    if method == "separate":  # a plain LoRA that had learned one task
        values |= {"method": "lora", "label": values["label"] or "separate"}
        return values, None
    if method not in ("clmoe", "llava_cmoe"):
        return values, None
    name = "prototype" if method == "clmoe" else options.pop("decider", "vae")
    values["locator"] = {
        "name": name,
        "feature": options.pop("feature", "last"),
        "samples": options.get("samples", 2000),
        "options": {},
    }
    if method == "clmoe":
        own = ("distance", "radius")
        values["locator"]["options"] = {key: options.pop(key) for key in own if key in options}
        return values, LOCATOR_FILE
    options.pop("samples", None)
    vae = options.pop("locator", {})
    values["locator"]["options"] = vae if name == "vae" else {}
    return values, OLD_BANK[name]
