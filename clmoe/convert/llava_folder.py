"""What every converted model becomes: a folder as the llava-hf models are, written whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.convert.clip import Clip
from clmoe.data.records import IMAGE_MARK
from clmoe.errors import ClmoeError
from clmoe.train.checkpoint import work_folder
from clmoe.utils.files import flush

if TYPE_CHECKING:
    from torch import Size, Tensor
    from transformers import LlamaTokenizer, LlavaConfig

PAD = "<pad>"
ROWS_MULTIPLE = 64  # llava-hf: 32000 rows become 32064
EMBEDDINGS = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

LANGUAGE = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."))
PROJECTOR = (
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
)
"""(beginning of a name in our folder, in LLaVA's or LLaMA's files)"""

_TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "rope_scaling", "rope_theta", "rope_parameters",  # the last in the place of the two since transformers 5
    "attention_bias", "mlp_bias", "pretraining_tp", "bos_token_id", "eos_token_id", "vocab_size",
)  # fmt: skip


@dataclass(frozen=True)
class Connection:
    """How LLaVA joins the two models: the tower's layer whose output is taken, and ``patch`` or ``cls_patch``."""

    layer: int = -2
    features: str = "patch"


def read_connection(values: dict[str, Any], where: Path) -> Connection:
    """From the ``mm_*`` fields of LLaVA's config.json.

    Raises:
        ClmoeError: not LLaVA-1.5's way of joining: another projector, tokens around images, images in tiles.
    """
    wanted = {
        "mm_projector_type": ("mlp2x_gelu",),
        "mm_vision_select_feature": ("patch", "cls_patch", None),
        "mm_use_im_start_end": (False, None),
        "mm_use_im_patch_token": (False, None),
        "image_aspect_ratio": ("pad", "square", None),
    }
    for name, allowed in wanted.items():
        if values.get(name) not in allowed:
            raise ClmoeError(f"{where}: {name} is {values.get(name)!r}; LLaVA-1.5 has {allowed[0]!r}")
    layer = values.get("mm_vision_select_layer", Connection.layer)
    if not isinstance(layer, int):
        raise ClmoeError(f"{where}: mm_vision_select_layer is {layer!r}, expected a number")
    return Connection(layer, values.get("mm_vision_select_feature") or Connection.features)


@dataclass(frozen=True)
class Language:
    """The language model's side: the fields of its config.json and its tokenizer, with ``<image>`` and ``<pad>``."""

    values: dict[str, Any]
    tokenizer: LlamaTokenizer
    dtype: str

    @property
    def vocabulary(self) -> int:
        """Tokens before ``<image>`` and ``<pad>``."""
        return self.values["vocab_size"]

    @property
    def rows(self) -> int:
        """Rows of the widened embeddings."""
        return -(-(self.vocabulary + 2) // ROWS_MULTIPLE) * ROWS_MULTIPLE


def open_language(folder: Path, values: dict[str, Any]) -> Language:
    """Check the LLaMA part of a config.json and add the two tokens to the folder's tokenizer.

    Raises:
        ClmoeError: a field or the tokenizer is missing, or the two disagree about the vocabulary.
    """
    from transformers import LlamaTokenizer

    where = folder / "config.json"
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(values.get(name), int):
            raise ClmoeError(f"{where}: {name} is {values.get(name)!r}, expected a number")
    if values.get("tie_word_embeddings"):
        raise ClmoeError(f"{where}: tie_word_embeddings is true; LLaVA-1.5 has a head of its own")
    if not any((folder / name).is_file() for name in ("tokenizer.model", "tokenizer.json")):
        raise ClmoeError(f"{folder}: no tokenizer: expected tokenizer.model or tokenizer.json")
    try:
        tokenizer = LlamaTokenizer.from_pretrained(
            folder, extra_special_tokens={"image_token": IMAGE_MARK}, padding_side="left"
        )
        tokenizer.add_special_tokens({"pad_token": PAD})
    except (OSError, ValueError) as error:
        raise ClmoeError(f"{folder}: its tokenizer cannot be read: {str(error).splitlines()[0]}") from error
    dtype = values.get("dtype") or values.get("torch_dtype") or "float16"
    language = Language({name: values[name] for name in _TEXT_FIELDS if name in values}, tokenizer, dtype)
    found = (tokenizer.image_token_id, tokenizer.pad_token_id)
    if found != (language.vocabulary, language.vocabulary + 1):
        raise ClmoeError(
            f"{folder}: the tokenizer puts {IMAGE_MARK} and {PAD} at {found}, but config.json says vocab_size "
            f"{language.vocabulary}: they do not belong together"
        )
    return language


def llava_config(language: Language, clip: Clip, connection: Connection) -> LlavaConfig:
    """The configuration of the written model."""
    from transformers import LlamaConfig, LlavaConfig

    tokenizer, with_class = language.tokenizer, connection.features == "cls_patch"
    text = LlamaConfig(
        **language.values | {"vocab_size": language.rows},
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    return LlavaConfig(
        architectures=["LlavaForConditionalGeneration"],
        dtype=language.dtype,
        vision_config=clip.config,
        text_config=text,
        image_token_index=tokenizer.image_token_id,
        image_seq_length=(clip.side // clip.patch) ** 2 + with_class,
        projector_hidden_act="gelu",
        vision_feature_layer=connection.layer,
        vision_feature_select_strategy="full" if with_class else "default",
        tie_word_embeddings=False,
    )


def wanted_tensors(config: LlavaConfig) -> dict[str, Size]:
    """Name in the llava-hf files -> shape of all tensors, from transformers' own class on the meta device."""
    import torch
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    renamed = (
        ("lm_head.", "language_model.lm_head."),
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    )
    return {replace_start(name, renamed): tensor.shape for name, tensor in model.state_dict().items()}


def replace_start(name: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The name with its beginning replaced by the rule that fits."""
    (old, new) = next(rule for rule in rules if name.startswith(rule[0]))
    return new + name.removeprefix(old)


def source_names(wanted: dict[str, Size], rules: tuple[tuple[str, str], ...]) -> dict[str, str]:
    """Source name -> our name of all wanted tensors that the rules (our beginning, theirs) are about."""
    ours = [name for name in wanted if any(name.startswith(start) for start, _ in rules)]
    return {replace_start(name, rules): name for name in ours}


def widen(language: Language, name: str, tensor: Tensor, origin: str) -> Tensor:
    """Add the rows of ``<image>``, ``<pad>`` and the filling to embeddings and head: the mean of all rows.

    llava-hf draws them around that mean. No prompt holds a filling row; the image's own is replaced by the picture's
    features; and as an output the mean row's logit is the mean logit, which no greedy answer picks.

    Args:
        tensor: ``[vocabulary, D]`` for the two names, anything for others.

    Returns:
        ``[rows, D]`` in the same dtype; the given rows bit for bit.

    Raises:
        ClmoeError: another number of rows than config.json says.
    """
    import torch

    if name not in (EMBEDDINGS, HEAD):
        return tensor
    if tensor.dim() != 2 or tensor.shape[0] != language.vocabulary:
        raise ClmoeError(f"{origin}: shape {list(tensor.shape)}, but config.json says vocab_size {language.vocabulary}")
    mean = tensor.mean(0, dtype=torch.float64).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(language.rows - language.vocabulary, -1)])


def save_rest(folder: Path, config: LlavaConfig, language: Language, clip: Clip) -> None:
    """Configurations, processor and tokenizer beside the weights."""
    from transformers import GenerationConfig, LlavaProcessor

    tokenizer = language.tokenizer
    config.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(folder)
    LlavaProcessor(
        image_processor=clip.images,
        tokenizer=tokenizer,
        patch_size=clip.patch,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``target`` when the block ends and vanishes when it fails.

    Raises:
        ClmoeError: the target exists.
    """
    if target.exists():
        raise ClmoeError(f"{target} exists: choose another folder or delete it")
    work = work_folder(target)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        yield work
        for path in work.rglob("*"):
            flush(path)
        work.rename(target)
        flush(target.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
