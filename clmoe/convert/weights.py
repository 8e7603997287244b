"""Foreign weights, and the LLaVA folder that they become.

Weight files are mapped, not read into memory: names, shapes and dtypes are checked before anything is written, and
tensors go from the map to the file. Of 14 GB, the process itself holds only the widened embeddings and head.
"""

import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch
from huggingface_hub import save_torch_state_dict
from tokenizers import Tokenizer
from torch import Size, Tensor
from transformers import (
    AutoProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from clmoe.bases.pieces import PAD, PROBES, SETTINGS, Ids, different, read_pieces
from clmoe.bases.stack import WITH_PILLOW, CLIPImageProcessorPil
from clmoe.data.records import IMAGE_MARK
from clmoe.errors import ClmoeError
from clmoe.utils.files import flush, read_json
from clmoe.utils.tensors import load_tensors, refuse_infinite, writing

# How each format names its tensors: prefix of the name in our folder (which is llava-hf's) -> prefix there.
LLAMA = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head."}
PROJECTOR = {
    "multi_modal_projector.linear_1.": "model.mm_projector.0.",
    "multi_modal_projector.linear_2.": "model.mm_projector.2.",
}
CLIP = {"vision_tower.vision_model.": "vision_model."}
OWN_TOWER = "model.vision_tower.vision_tower.vision_model."
IN_MEMORY = {  # in transformers' LlavaForConditionalGeneration
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "vision_tower.vision_model.": "model.vision_tower.",
}
LEFT_OUT = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|position_ids)$|^(text_model|text_projection|visual_projection)\.|^logit_scale$"
)
"""Buffers that follow from the configuration, and the text side of a whole CLIP."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SHARD_SIZE = "5GB"
Part = tuple[Path, dict[str, Tensor], dict[str, str]]
"""Where tensors come from, the tensors themselves, and their layout."""


def renamed(names: Iterable[str], layout: dict[str, str]) -> dict[str, str]:
    """Their name -> our name, for those of our ``names`` that the layout covers."""
    pairs = [(name, ours) for name in names for ours in layout if name.startswith(ours)]
    return {layout[ours] + name.removeprefix(ours): name for name, ours in pairs}


def open_tensors(path: Path) -> dict[str, Tensor]:
    """A file's tensors, mapped; nothing in it is run. ClmoeError if it is missing, damaged, or has no dense tensors."""
    if not path.is_file():
        raise ClmoeError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:  # torch's zip format can be mapped if nothing is compressed: a map shows members as they are
        mapped = is_zipfile(path) and all(member.compress_type == ZIP_STORED for member in ZipFile(path).infolist())
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a strange file makes torch raise almost anything
        raise ClmoeError(f"{path}: refused: {_reason(error)}") from error
    if not isinstance(content, dict):
        raise ClmoeError(f"{path}: refused: it holds a {type(content).__name__}, not tensors by name")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ClmoeError(f"{path}: refused: {name!r} is not the name of a dense tensor")
    refuse_infinite(content, path)
    return {name: tensor.detach() for name, tensor in content.items()}


def _reason(error: Exception) -> str:
    """One line of torch's message; the rest explains how to turn the protection off."""
    text = str(error).strip() or type(error).__name__
    if refused := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {refused[1]}, which is not a tensor; nothing in it was run"
    return "torch does not recognise it as weights" if "weights_only" in text else text.splitlines()[0][:300]


def model_tensors(folder: Path) -> dict[str, Tensor]:
    """A model folder's tensors, from safetensors rather than pickles. Raises ClmoeError as ``open_tensors`` does."""
    for file in (folder / "model.safetensors", folder / "pytorch_model.bin"):
        index = file.with_name(f"{file.name}.index.json")
        if file.is_file():
            return open_tensors(file)
        if index.is_file():
            try:
                files = sorted({folder / name for name in read_json(index)["weight_map"].values()})
            except (KeyError, TypeError, AttributeError) as error:
                raise ClmoeError(f"{index}: not an index of weights: {error!r}") from error
            return _merged(files)
    raise ClmoeError(f"{folder}: no weights; expected model.safetensors or pytorch_model.bin, whole or in shards")


def _merged(files: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in files:
        found = open_tensors(path)
        for name in found.keys() & tensors.keys():
            raise ClmoeError(f"{path}: {name} is in another file as well")
        tensors |= found
    return tensors


def check_tensors(found: dict[str, Tensor], shapes: dict[str, Size], where: Path) -> None:
    """Raise ClmoeError unless the tensors are those in ``shapes`` (and ``LEFT_OUT``), in 16- or 32-bit floats."""
    unknown = [name for name in found.keys() - shapes.keys() if not LEFT_OUT.search(name)]
    for problem, names in (("lacks", shapes.keys() - found.keys()), ("should not hold", unknown)):
        if names:
            more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
            raise ClmoeError(f"{where}: {problem} {', '.join(sorted(names)[:3])}{more}")
    for name, needed in shapes.items():
        shape, dtype = found[name].shape, found[name].dtype
        if shape != needed:
            raise ClmoeError(f"{where}: {name} has shape {list(shape)}, but the configuration gives {list(needed)}")
        if dtype not in DTYPES:
            raise ClmoeError(f"{where}: {name} is {dtype}; expected 16- or 32-bit floating point")


# ---- A LLaVA without its weights

ROWS_MULTIPLE = 64  # llava-hf: 32000 rows become 32064
TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_scaling", "rope_theta", "rope_parameters",  # transformers 5 has the third in place of the other two
    "attention_bias", "mlp_bias", "pretraining_tp", "bos_token_id", "eos_token_id",
)  # fmt: skip


def read_tower(folder: Path) -> tuple[Any, Any]:
    """``CLIPVisionConfig`` and image processor of a CLIP, whole or its vision model only; ClmoeError if unfit."""
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise ClmoeError(f"--vision: {folder / 'config.json'}: model_type is {kind!r}, expected 'clip'")
    read_json(folder / "preprocessor_config.json")  # without it, transformers' own reader would make one up
    tower: Any = CLIPVisionConfig.from_pretrained(folder)
    images = CLIPImageProcessorPil.from_pretrained(folder)
    side, crop = tower.image_size, dict(images.crop_size)
    if crop != {"height": side, "width": side}:
        raise ClmoeError(f"--vision {folder}: images are cropped to {crop}, but the tower takes {side} pixels")
    return tower, images


def check_connection(values: dict[str, Any], where: Path) -> None:
    """Raise ClmoeError if a config.json's ``mm_*`` fields do not join tower and language model as LLaVA-1.5 does."""
    allowed = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for name, choices in allowed.items():
        if values.get(name) not in choices:
            raise ClmoeError(f"{where}: {name} is {values.get(name)!r}; LLaVA-1.5 has {choices[0]!r}")


def llava_config(
    language: dict[str, Any], tower: Any, connection: dict[str, Any], added: tuple[int, int]
) -> LlavaConfig:
    """Made from two config.json, LLaVA's ``mm_*`` fields (or LLaVA-1.5's) and the ids of ``<image>`` and ``<pad>``."""
    with_class = connection.get("mm_vision_select_feature") == "cls_patch"
    text = LlamaConfig(
        **{name: language[name] for name in TEXT_FIELDS if name in language},
        vocab_size=-(-(language["vocab_size"] + 2) // ROWS_MULTIPLE) * ROWS_MULTIPLE,
        pad_token_id=added[1],
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype=language.get("dtype") or language.get("torch_dtype") or "float16",
        vision_config=tower,
        text_config=text,
        image_token_index=added[0],
        image_seq_length=(tower.image_size // tower.patch_size) ** 2 + with_class,
        projector_hidden_act="gelu",
        vision_feature_layer=connection.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy="full" if with_class else "default",
        tie_word_embeddings=False,
    )


def read_tokenizer(folder: Path) -> tuple[LlamaTokenizer, Ids]:
    """The folder's tokenizer with ``<image>`` and ``<pad>`` added, and the ids that the original gives for ``PROBES``.

    A ``tokenizer.model`` wins over a ``tokenizer.json``. Raises ClmoeError if there is no readable one.
    """
    settings: dict[str, Any] = dict(SETTINGS)
    try:
        if (folder / "tokenizer.model").is_file():
            if (folder / "tokenizer_config.json").is_file():
                settings |= {"model_max_length": read_json(folder / "tokenizer_config.json").get("model_max_length")}
            tokenizer, ids = read_pieces(folder / "tokenizer.model", **settings)
        else:
            raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
            tokenizer = LlamaTokenizer.from_pretrained(folder, **settings)
            ids = {text: raw.encode(text, add_special_tokens=False).ids for text in PROBES}
        tokenizer.add_special_tokens({"pad_token": PAD})
    except Exception as error:  # tokenizers raises nothing more specific
        raise ClmoeError(f"{folder}: no readable tokenizer.model or tokenizer.json: {error}") from error
    if getattr(tokenizer, "image_token_id", None) is None:  # in transformers 5.0 the file wins over our settings
        where = folder / "tokenizer_config.json"
        raise ClmoeError(f"{where}: field 'extra_special_tokens' leaves no place for {IMAGE_MARK}: remove the field")
    return tokenizer, ids


# ---- Writing


def convert_liuhaotian(source: Path, target: Path, vision: Path) -> str:
    """Convert LLaVA-1.5 as its authors publish it (liuhaotian/llava-v1.5-7b, 13b); return what was found.

    A tower in the checkpoint may be trained and wins over that of the CLIP folder, which says how images are scaled.
    Raises ClmoeError as ``_assemble`` does.
    """
    values = read_json(source / "config.json")
    check_connection(values, source / "config.json")
    tensors = model_tensors(source)
    if any(name.startswith(OWN_TOWER) for name in tensors):
        tower, layout, parts = "its own vision tower", {"vision_tower.vision_model.": OWN_TOWER}, []
    else:
        tower, layout, parts = f"the vision tower of {vision}", {}, [(vision, model_tensors(vision), CLIP)]
    whole = (source, tensors, LLAMA | PROJECTOR | layout)
    return f"original LLaVA {source} with {tower}: {_assemble(source, target, vision, values, [whole, *parts])} tensors"


def convert_vicuna(source: Path, target: Path, vision: Path, projector: Path) -> str:
    """Write the papers' starting point from a LLaMA (Vicuna), a CLIP and a projector; return what was put together.

    A config.json that LLaVA-1.5's first stage left beside ``mm_projector.bin`` says which of the tower's features are
    used; without one they are LLaVA-1.5's. Raises ClmoeError as ``_assemble`` does.
    """
    beside = projector.with_name("config.json")
    connection = read_json(beside) if beside.is_file() else {"mm_projector_type": "mlp2x_gelu"}
    check_connection(connection, beside)
    parts = [
        (projector, open_tensors(projector), PROJECTOR),
        (source, model_tensors(source), LLAMA),
        (vision, model_tensors(vision), CLIP),
    ]
    count = _assemble(source, target, vision, connection, parts)
    return f"LLaMA {source} with CLIP {vision} and projector {projector}: {count} tensors"


def _assemble(source: Path, target: Path, vision: Path, connection: dict[str, Any], parts: list[Part]) -> int:
    """Write a LLaVA folder from ``parts`` that cover it, whole or not at all; return its number of tensors.

    ``source`` has the language model's config.json and tokenizer. Raises ClmoeError if a size, the tokenizer or a
    tensor does not fit, or the disk does not hold what was written.
    """
    language, (tokenizer, ids) = read_json(source / "config.json"), read_tokenizer(source)
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(language.get(name), int):
            raise ClmoeError(f"{source / 'config.json'}: {name} is {language.get(name)!r}, expected a number")
    vocabulary, added = language["vocab_size"], (tokenizer.image_token_id, tokenizer.pad_token_id)
    if added != (vocabulary, vocabulary + 1):
        apart = f"the tokenizer puts {IMAGE_MARK} and {PAD} at {added}, but config.json says vocab_size {vocabulary}"
        raise ClmoeError(f"{source}: {apart}: they do not belong together")
    tower, images = read_tower(vision)
    config = llava_config(language, tower, connection, added)
    with torch.device("meta"):
        made = LlavaForConditionalGeneration(config).state_dict()
    state = {name.replace("vision_tower.vision_model.", "vision_tower."): made[name] for name in made}  # in 5.0
    ours = renamed(state, {there: here for here, there in IN_MEMORY.items()})
    shapes = {name: state[there].shape for name, there in ours.items()}
    widened = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
    before = shapes | {name: Size([vocabulary, *shapes[name][1:]]) for name in widened}
    tensors: dict[str, Tensor] = {}
    for where, found, layout in parts:
        names = renamed(shapes, layout)
        check_tensors(found, {there: before[name] for there, name in names.items()}, where)
        tensors |= {name: found[there] for there, name in names.items()}
    tensors |= {name: _widen(tensors[name], shapes[name][0]) for name in widened}
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    )
    work = target.parent / f".{target.name}.partial"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        _save_all_but_weights(work, config, processor, ids)
        write_weights(tensors, work)
        work.rename(target)
        flush(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return len(tensors)


def _widen(tensor: Tensor, rows: int) -> Tensor:
    """``[V, D]`` -> ``[rows, D]``: ``<image>``, ``<pad>`` and the filling get the mean of all rows.

    llava-hf draws them around that mean. As an output, its logit is the mean logit, which greedy decoding never picks.
    """
    mean = tensor.mean(0, dtype=torch.float64).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def _save_all_but_weights(folder: Path, config: LlavaConfig, processor: LlavaProcessor, ids: Ids) -> None:
    """The tokenizer is read back and must give the original's ids."""
    config.save_pretrained(folder)
    special = {name: getattr(processor.tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**special).save_pretrained(folder)
    processor.save_pretrained(folder)
    written = AutoProcessor.from_pretrained(folder, **WITH_PILLOW).tokenizer
    if written("")["input_ids"] != [processor.tokenizer.bos_token_id]:
        raise ClmoeError(f"the converted tokenizer puts {written('')['input_ids']} before a text, not one <s>")
    if reason := different(written, ids):
        raise ClmoeError(f"the converted tokenizer {reason}")


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, bit for bit, as transformers does, and read them back. Raises ClmoeError if that fails."""
    with writing(folder):
        save_torch_state_dict(tensors, folder, max_shard_size=SHARD_SIZE)
    for path in folder.iterdir():
        flush(path)
    check_written(folder, tensors)


def check_written(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise ClmoeError naming a tensor unless a folder's safetensors files hold exactly these, bit for bit."""
    written = _merged(sorted(folder.glob("*.safetensors")))
    for name in written.keys() | tensors.keys():
        pair = [held[name].contiguous().view(torch.uint8) for held in (written, tensors) if name in held]
        if len(pair) < 2 or not torch.equal(*pair):
            raise ClmoeError(f"{folder}: {name} is not on disk as it was written: check the disk and convert again")
