"""``clmoe convert``: another project's model or adapter, or a checkpoint that clmoe 0.1 sealed (format 1) -> ours."""

import copy
import re
import shutil
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Size, Tensor

from clmoe.bases.llava import base_fingerprint, meta_base, shapes_file
from clmoe.benchmarks.base import Benchmark, load_benchmark
from clmoe.config import LINEARS, Config, build, dump_config, load_config, merge, read_yaml
from clmoe.convert import weights
from clmoe.errors import ClmoeError
from clmoe.experts.forward import adapted_base
from clmoe.experts.model import adapter_tensors, count_parameters
from clmoe.locators import make_locator
from clmoe.locators.base import FILE as LOCATOR_FILE
from clmoe.methods import method_class
from clmoe.methods.base import EXPANSION, attach_on_meta
from clmoe.train.checkpoint import CONFIG, LINEAGE, MANIFEST, OLD_FORMAT, Lineage, build_folder, read_checkpoint
from clmoe.utils.files import file_sha256, read_json, write_json
from clmoe.utils.paths import check_target, resolve_model_path
from clmoe.utils.tensors import load_tensors, save_tensors

LIUHAOTIAN, LLAMA, ADAPTER = "an original LLaVA", "a LLaMA or Vicuna", "an adapter of CoIN or CL-MoE"
OLD = "a checkpoint that clmoe 0.1 sealed"
NEEDED = {LIUHAOTIAN: {"vision"}, LLAMA: {"vision", "projector"}, ADAPTER: {"model", "benchmark", "tasks"}, OLD: set()}
"""The options that each format needs; it accepts no others."""


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
    read = (source, options.vision, options.model and Path(options.model))
    check_target("DST", target, folders=[folder for folder in read if folder is not None and folder.is_dir()])
    if kind == LIUHAOTIAN:
        found = weights.convert_liuhaotian(source, target, options.vision)
    elif kind == LLAMA:
        found = weights.convert_vicuna(source, target, options.vision, options.projector)
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
    """Return what it was. Raises ClmoeError if a file is missing or damaged, or a setting has no counterpart."""
    files = read_json(source / MANIFEST)["files"]
    for name, entry in files.items():
        if not (source / name).is_file() or file_sha256(source / name) != entry["sha256"]:
            raise ClmoeError(f"{source / name} is missing or damaged: restore it")
        if name.endswith(".safetensors") and name not in DROPPED:
            load_tensors(source / name)  # refuses NaN and infinity
    values, bank = _upgraded(read_yaml(source / CONFIG))
    config = build(Config, values, str(source / CONFIG))

    def fill(folder: Path) -> None:
        for name in files.keys() - set(DROPPED):
            shutil.copy(source / name, folder / (EXPANSION if name == "plan.json" else name))
        (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
        lineage = read_json(source / LINEAGE) | {"method": config.method}
        lineage.pop("config_sha256", None)  # that of the settings under their old names
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


# ---- Adapters that CoIN's and CL-MoE's training code saved
#
# `adapter_config.json` names the kind, `adapter_model.bin` holds a pair of matrices per expert and a router per linear,
# `non_lora_trainables.bin` the tuned projector. Both projects' `forward` computes, per token and linear,
#
#     y = W0 x + alpha / r * sum_i softmax(W_r x)_i * B_i A_i x,      A_i: r/E x din, B_i: dout x r/E
#
# which is MoELoRA's formula here with `rank_is: total`. CL-MoE's adapters become `moelora` too: their files hold no
# task gates, centres or statistics, which the method `clmoe` needs.

METHODS = {"MOE_LORA_CoIN": "moelora", "MOE_LORA_CLMoE": "moelora", "LORA": "lora"}  # their peft_type -> our method
PROJECTOR_FILE = "non_lora_trainables.bin"
START = "base_model.model.model."
PLACES = {START + ours: f"base_model.model.{theirs}" for ours, theirs in weights.PROJECTOR.items()}
PLACES |= {f"{START}language_model.": START}
"""Prefix of a name in our file -> prefix in theirs; ``_pieces`` has the suffixes."""

PLAIN = {
    "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "layers_to_transform": None,
    "layers_pattern": None, "use_rslora": False, "use_dora": False, "alpha_pattern": {}, "rank_pattern": {},
}  # fmt: skip
"""Settings under which the formula above holds."""


def read_settings(folder: Path) -> tuple[str, dict[str, Any]]:
    """``peft_type``, and our ``adapter`` section. Raises ClmoeError for a kind or setting that changes the formula."""
    where = folder / "adapter_config.json"
    values = read_json(where)
    kind, targets = values.get("peft_type"), values.get("target_modules")
    if kind not in METHODS:
        raise ClmoeError(f"{where}: peft_type is {kind!r}, known are {', '.join(METHODS)}")
    for name, plain in PLAIN.items():
        if (values.get(name) or plain) != plain:
            raise ClmoeError(f"{where}: {name} is {values[name]!r}, expected {plain!r}")
    if not isinstance(targets, list) or not targets or not set(targets) <= set(LINEARS):
        raise ClmoeError(f"{where}: target_modules is {targets!r}, expected a list of {', '.join(LINEARS)}")
    sizes = {"rank": "r", "alpha": "lora_alpha"} | ({} if kind == "LORA" else {"experts": "expert_num"})
    for theirs in sizes.values():
        if not isinstance(values.get(theirs), int) or values[theirs] < 1:
            raise ClmoeError(f"{where}: {theirs} is {values.get(theirs)!r}, expected a positive number")
    return kind, {
        **{ours: values[theirs] for ours, theirs in sizes.items()},
        "rank_is": "total",
        "scale": None,
        "dropout": float(values.get("lora_dropout") or 0),
        "targets": [name for name in LINEARS if name in targets],
        "router_scope": "per_linear",
        "router_top_k": None,
        "train_projector": (folder / PROJECTOR_FILE).is_file(),
    }


def convert_adapter(source: Path, target: Path, model: str, benchmark: Benchmark, tasks: list[str]) -> str:
    """Write the checkpoint of these tasks; return what was found. Raises ClmoeError if anything does not fit."""
    benchmark.named(tasks, "--tasks")
    kind, settings = read_settings(source)
    config = load_config(METHODS[kind], merge(benchmark.recipe, {"adapter": settings}), [], model)
    method = method_class(config.method)(config)
    adapted = attach_on_meta(method, meta_base(shapes_file(config.model)))
    tensors = read_tensors(source, {name: tensor.shape for name, tensor in adapter_tensors(adapted).items()}, settings)
    trainable, stored = count_parameters(adapted)
    lineage = Lineage(
        method=config.method,
        benchmark=benchmark.name,
        tasks=tasks,
        seed=config.seed,
        parent=None,
        base=base_fingerprint(resolve_model_path(config.model.path)),
        steps=0,  # their files do not say how the adapter was trained
        trainable_parameters=trainable,
        adapter_parameters=stored,
        effective_scale=method.effective_scale(),
    )
    build_folder(target, lambda work: _write(work, adapted, tensors, config, lineage))
    read_checkpoint(target)
    size = f"{settings['experts']} experts" if "experts" in settings else "one pair of matrices"
    tuned = "with" if settings["train_projector"] else "without"
    return f"adapter {source}: {kind}, {size} on {', '.join(settings['targets'])}, {tuned} a tuned projector"


def read_tensors(folder: Path, wanted: dict[str, Size], settings: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors under our names (with their shapes in ``wanted``), in float32, which holds 16-bit numbers exactly."""
    tensors: dict[str, Tensor] = {}
    for path in (folder / "adapter_model.bin", *([folder / PROJECTOR_FILE] if settings["train_projector"] else [])):
        pieces = {
            name: _pieces(theirs, wanted[name], settings.get("experts", 0))
            for theirs, name in weights.renamed(wanted, PLACES).items()
            if ("mm_projector" in theirs) == (path.name == PROJECTOR_FILE)
        }
        found = _without_twins(weights.open_tensors(path), path)
        weights.check_tensors(found, {there: shape for names, shape, _ in pieces.values() for there in names}, path)
        for name, (names, _, dim) in pieces.items():
            tensors[name] = torch.cat([found[there].float() for there in names], dim)
    return tensors


def _pieces(name: str, shape: Size, experts: int) -> tuple[list[str], Size, int]:
    """Names and shape of their tensors (one per expert) that make up one of ours, and the dimension to join along."""
    packed = re.fullmatch(r"(.+)\.clmoe_experts\.\w+\.([AB])", name)
    if packed is None:
        return [name.replace(".clmoe_routers.instance.0.", ".lora_router.")], shape, 0
    place, factor = packed.groups()
    dim, sizes = "AB".index(factor), list(shape)
    sizes[dim] //= experts
    return [f"{place}.lora_{factor}.lora{factor}.{i}.weight" for i in range(experts)], Size(sizes), dim


def _without_twins(found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Keep one of an expert's two names, ``loraA.0.weight`` and ``loraA.0.mlp.weight``; they must not differ."""
    kept: dict[str, Tensor] = {}
    for name, tensor in found.items():
        short = re.sub(r"\.(lora[AB]\.\d+)\.mlp\.weight$", r".\1.weight", name)
        twin = kept.setdefault(short, tensor)
        if twin.dtype != tensor.dtype or not twin.equal(tensor):
            raise ClmoeError(f"{path}: {name} differs from {short}, which is another name of the same matrix")
    return kept


def _write(work: Path, adapted: PeftModel, tensors: dict[str, Tensor], config: Config, lineage: Lineage) -> None:
    """The files of a checkpoint, as ``save_adapter`` and the end of a training write them."""
    llava = type(adapted_base(adapted))
    shape = adapted.peft_config[adapted.active_adapter]
    shape.inference_mode, shape.base_model_name_or_path = True, config.model.path
    origin = {"base_model_class": llava.__name__, "parent_library": llava.__module__}
    shape.save_pretrained(str(work), auto_mapping_dict=origin)
    save_tensors(tensors, work / "adapter_model.safetensors", {"format": "pt"})
    weights.check_written(work, tensors)
    (work / CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_json(work / LINEAGE, asdict(lineage))
