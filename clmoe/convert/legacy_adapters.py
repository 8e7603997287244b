"""Adapters that CoIN's and CL-MoE's training code left: three files -> one of our checkpoints.

``adapter_config.json`` names the kind (``MOE_LORA_CoIN``, ``MOE_LORA_CLMoE``, or plain ``LORA``), ``adapter_model.bin``
holds one pair of matrices per expert and a router per linear, ``non_lora_trainables.bin`` the tuned projector. Both
projects compute, per token and linear (their ``forward``),

    y = W0 x + alpha / r * sum_i softmax(W_r x)_i * B_i A_i x,      A_i: r/E x din, B_i: dout x r/E

which is MoELoRA's formula here with ``rank_is: total``. CL-MoE's adapters become ``moelora`` too: their files hold
neither task gates nor centres nor statistics, which the method ``clmoe`` needs (they are absent from the released code
as well), so what is converted is the router that was trained.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from clmoe.bases.llava import base_fingerprint
from clmoe.benchmarks.base import Benchmark
from clmoe.config import Config, dump_config, load_config, merge
from clmoe.convert.pickles import ADAPTER_LIMIT, PROJECTOR_LIMIT
from clmoe.convert.shards import check_names, open_file, tensors_of
from clmoe.errors import ClmoeError
from clmoe.methods import method_class
from clmoe.methods.plan import adapted_meta, meta_llava, shapes_file
from clmoe.train.checkpoint import CONFIG, LINEAGE, Lineage, build_folder, lineage_of, read_checkpoint
from clmoe.utils.files import read_json, write_json
from clmoe.utils.paths import resolve_model_path
from clmoe.utils.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

KINDS = {"MOE_LORA_CoIN": "moelora", "MOE_LORA_CLMoE": "moelora", "LORA": "lora"}
"""``peft_type`` in their files -> our method."""
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
LINEARS = (*ATTENTION, "gate_proj", "up_proj", "down_proj")
_PLAIN = {
    "bias": "none",
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "use_rslora": False,
    "use_dora": False,
    "alpha_pattern": {},
    "rank_pattern": {},
}


@dataclass(frozen=True)
class Legacy:
    """What ``adapter_config.json`` says. ``experts`` is 0 for plain LoRA; ``projector`` is None if it was not tuned."""

    folder: Path
    kind: str
    rank: int
    alpha: float
    dropout: float
    experts: int
    targets: list[str]
    projector: Path | None

    @property
    def method(self) -> str:
        return KINDS[self.kind]


def read_legacy(folder: Path) -> Legacy:
    """Check the configuration.

    Raises:
        ClmoeError: another kind of adapter, or a setting that changes the formula above.
    """
    where = folder / "adapter_config.json"
    values = read_json(where)
    kind = values.get("peft_type")
    if kind not in KINDS:
        raise ClmoeError(f"{where}: peft_type is {kind!r}, known are {', '.join(KINDS)}")
    for name, plain in _PLAIN.items():
        if (values.get(name) or plain) != plain:
            raise ClmoeError(f"{where}: {name} is {values[name]!r}, expected {plain!r}")
    targets = values.get("target_modules")
    if not isinstance(targets, list) or not targets or not set(targets) <= set(LINEARS):
        raise ClmoeError(f"{where}: target_modules is {targets!r}, expected a list of {', '.join(LINEARS)}")
    experts = values.get("expert_num") if KINDS[kind] == "moelora" else 0
    numbers = {"r": values.get("r"), "lora_alpha": values.get("lora_alpha"), "expert_num": experts}
    for name, number in numbers.items():
        if not isinstance(number, int) or (number < 1 and name != "expert_num"):
            raise ClmoeError(f"{where}: {name} is {number!r}, expected a positive number")
    projector = folder / "non_lora_trainables.bin"
    return Legacy(
        folder,
        kind,
        numbers["r"],
        float(numbers["lora_alpha"]),
        float(values.get("lora_dropout") or 0),
        numbers["expert_num"],
        [name for name in LINEARS if name in targets],
        projector if projector.is_file() else None,
    )


def legacy_config(legacy: Legacy, model: str, benchmark: Benchmark) -> Config:
    """Our configuration of the same adapter; what it was trained with besides is not in its files."""
    adapter = {
        "rank": legacy.rank,
        "rank_is": "total",
        "alpha": legacy.alpha,
        "scale": None,
        "dropout": legacy.dropout,
        "targets": legacy.targets,
        "router_scope": "per_linear",
        "router_top_k": None,
        "train_projector": legacy.projector is not None,
        **({"experts": legacy.experts} if legacy.experts else {}),
    }
    return load_config(legacy.method, merge(benchmark.recipe, {"adapter": adapter}), [], model)


def convert_adapter(source: Path, target: Path, model: str, benchmark: Benchmark, tasks: list[str]) -> str:
    """Write the checkpoint; returns what was found.

    Args:
        model: what the adapter was trained on, as for ``clmoe train``; only its shapes and identity are read.
        tasks: learned so far, oldest first.

    Raises:
        ClmoeError: a file is missing, hostile or does not fit; a tensor is missing, unknown or of another shape.
    """
    for task in tasks:
        benchmark.task(task)
    legacy = read_legacy(source)
    config = legacy_config(legacy, model, benchmark)
    method = method_class(config.method)(config)
    adapted = adapted_meta(method, meta_llava(shapes_file(config.model)))
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".adapter-") as scratch, ExitStack() as stack:
        tensors = read_tensors(legacy, adapted, Path(scratch), stack)
    fingerprint = base_fingerprint(resolve_model_path(config.model.path))
    # how the adapter was trained is not in its files: no steps, no parent
    lineage = lineage_of(method, adapted, benchmark=benchmark.name, tasks=tasks, parent=None, base=fingerprint, steps=0)
    build_folder(target, lambda work: _write(work, adapted, tensors, config, lineage))
    read_checkpoint(target)
    _same(load_tensors(target / "adapter_model.safetensors"), tensors, target)
    told = (
        f"{legacy.experts} experts of rank {legacy.rank // legacy.experts}" if legacy.experts else f"rank {legacy.rank}"
    )
    tuned = "with" if legacy.projector else "without"
    return f"adapter {source}: {legacy.kind}, {told} on {', '.join(legacy.targets)}, {tuned} a tuned projector"


def read_tensors(legacy: Legacy, adapted: PeftModel, scratch: Path, stack: ExitStack) -> dict[str, Tensor]:
    """All tensors of the checkpoint under our names, float32, from the legacy files.

    Raises:
        ClmoeError: see ``convert_adapter``.
    """
    blocks = adapted.config.text_config.num_hidden_layers
    path = legacy.folder / "adapter_model.bin"
    found = _without_twins(_load(path, ADAPTER_LIMIT, scratch, stack), path)
    places = [
        (f"layers.{block}.{'self_attn' if name in ATTENTION else 'mlp'}.{name}", name)
        for block in range(blocks)
        for name in legacy.targets
    ]
    check_names(set(found), {key for place, _ in places for key in _legacy_names(legacy, place)}, None, path)
    tensors: dict[str, Tensor] = {}
    for place, name in places:
        tensors |= _packed(legacy, place, name, found)
    if legacy.projector is not None:
        tensors |= _projector(legacy.projector, scratch, stack)
    _check_shapes(tensors, adapted, legacy.folder)
    return tensors


def _load(path: Path, limit: int, scratch: Path, stack: ExitStack) -> dict[str, Tensor]:
    """A file's tensors in float32, which holds all 16-bit numbers exactly."""
    weights = open_file(path, limit, scratch, stack)
    return {name: tensor.float() for file in weights.files for name, tensor in tensors_of(file, scratch)}


def _without_twins(found: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """An expert's matrix has two names in their code, ``loraA.0.weight`` and ``loraA.0.mlp.weight``; keep the first.

    Raises:
        ClmoeError: both are in the file and differ.
    """
    kept: dict[str, Tensor] = {}
    for name, tensor in found.items():
        short = re.sub(r"\.(lora[AB]\.\d+)\.mlp\.weight$", r".\1.weight", name)
        if short in kept and not kept[short].equal(tensor):
            raise ClmoeError(f"{path}: {name} differs from its other name")
        kept[short] = tensor
    return kept


def _legacy_names(legacy: Legacy, place: str) -> list[str]:
    """Names in ``adapter_model.bin`` of one linear's tensors."""
    start = f"base_model.model.model.{place}"
    if not legacy.experts:
        return [f"{start}.lora_A.weight", f"{start}.lora_B.weight"]
    experts = range(legacy.experts)
    return [
        *(f"{start}.lora_A.loraA.{i}.weight" for i in experts),
        *(f"{start}.lora_B.loraB.{i}.weight" for i in experts),
        f"{start}.lora_router.weight",
    ]


def _packed(legacy: Legacy, place: str, name: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """One linear's tensors as ours: ``A [E*r, din]``, ``B [dout, E*r]``, router ``[E, din]``."""
    import torch

    from clmoe.experts.model import tensor_name

    module = f"model.language_model.{place}"
    parts = [found[key] for key in _legacy_names(legacy, place)]
    if not legacy.experts:
        return {tensor_name(module, f"lora_{factor}.weight"): part for factor, part in zip("AB", parts, strict=True)}
    try:
        A, B = torch.cat(parts[: legacy.experts]), torch.cat(parts[legacy.experts : -1], dim=1)
    except (RuntimeError, IndexError) as error:
        raise ClmoeError(f"{legacy.folder}: the experts of {place} do not have one shape: {error}") from error
    return {
        tensor_name(module, f"clmoe_experts.{name}.A"): A,
        tensor_name(module, f"clmoe_experts.{name}.B"): B,
        tensor_name(module, "clmoe_routers.instance.0.weight"): parts[-1],
    }


def _projector(path: Path, scratch: Path, stack: ExitStack) -> dict[str, Tensor]:
    """``base_model.model.model.mm_projector.{0,2}.{weight,bias}`` under our names."""
    from clmoe.experts.config import PROJECTOR
    from clmoe.experts.model import tensor_name

    names = {
        f"base_model.model.model.mm_projector.{theirs}.{kind}": tensor_name(f"model.{PROJECTOR}", f"{ours}.{kind}")
        for theirs, ours in (("0", "linear_1"), ("2", "linear_2"))
        for kind in ("weight", "bias")
    }
    found = _load(path, PROJECTOR_LIMIT, scratch, stack)
    check_names(set(found), set(names), None, path)
    return {names[name]: tensor for name, tensor in found.items()}


def _check_shapes(tensors: dict[str, Tensor], adapted: PeftModel, where: Path) -> None:
    from clmoe.experts.model import adapter_tensors

    wanted = adapter_tensors(adapted)
    check_names(set(tensors), set(wanted), None, where)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise ClmoeError(
                f"{where}: {name} would have shape {list(tensor.shape)}, the model needs {list(wanted[name].shape)}"
            )


def _same(written: dict[str, Tensor], tensors: dict[str, Tensor], target: Path) -> None:
    for name in written.keys() | tensors.keys():
        if name not in written or name not in tensors or not written[name].equal(tensors[name]):
            raise ClmoeError(f"{target}: {name} is not on disk as it was converted")


def _write(work: Path, adapted: PeftModel, tensors: dict[str, Tensor], config: Config, lineage: Lineage) -> None:
    """The files of a checkpoint, as ``save_adapter`` and a training's end write them."""
    from clmoe.experts.model import adapted_base

    llava = type(adapted_base(adapted))
    shape = adapted.peft_config[adapted.active_adapter]
    shape.inference_mode, shape.base_model_name_or_path = True, config.model.path
    origin = {"base_model_class": llava.__name__, "parent_library": llava.__module__}
    shape.save_pretrained(str(work), auto_mapping_dict=origin)
    save_tensors(tensors, work / "adapter_model.safetensors", {"format": "pt"})
    (work / CONFIG).write_text(dump_config(config), encoding="utf-8")
    write_json(work / LINEAGE, lineage.as_json())
