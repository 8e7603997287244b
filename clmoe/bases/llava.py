"""Bases, which are transformers' own classes: loading, identity, inputs, and the names of their parts.

Everything else takes a base as a ``PreTrainedModel`` and finds its parts through the functions here.
"""

import hashlib
import re
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from clmoe.bases.chat import Chat, open_processor
from clmoe.bases.families import DECODER, FAMILIES, LLAVA, Family, family_of
from clmoe.bases.pieces import repaired
from clmoe.bases.stack import WITH_PILLOW, tower_names
from clmoe.bases.vision import VisionCache, attach_cache
from clmoe.config import ModelConfig
from clmoe.data import images
from clmoe.data.batches import Item, PromptItem, TrainItem
from clmoe.data.prompts import IGNORE, encode_prompt, encode_training, render
from clmoe.data.records import Question, TrainRecord
from clmoe.errors import ClmoeError
from clmoe.utils.files import read_json
from clmoe.utils.paths import is_hub_name, known_configs, resolve_model_path, shipped_root
from clmoe.utils.tensors import is_finite, load_tensors

HUB_TIMEOUT = 5.0  # seconds
UNCUT = 2**31
SOFT = 2**40
"""The id of the first open place for a soft prompt token; no vocabulary is as large."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's decoder blocks."""
    return model.get_decoder().layers


def projector_names(base: "LoadedBase") -> list[str]:
    """Modules below ``model`` that map the image encoder's features to token embeddings; lists are taken apart."""
    parts = {name: base.model.get_submodule(f"model.{name}") for name in base.family.projector}
    found = (
        [f"{name}.{i}" for i in range(len(x))] if isinstance(x, nn.ModuleList) else [name] for name, x in parts.items()
    )
    return [name for names in found for name in names]


def vision_tower_of(model: PreTrainedModel) -> nn.Module:
    """The image encoder."""
    return model.get_submodule("model.vision_tower")


def language_model_pattern(names: list[str], decoder: str = DECODER) -> str:
    """Regular expression for these modules of the decoder blocks (never the vision tower's): ``gate_proj``, ``mlp``."""
    return rf".*{decoder}\.layers\.\d+\.(mlp|self_attn|mlp\..+)?\.?({'|'.join(names)})"


def block_of(module_name: str) -> str:
    """``...language_model.layers.7.mlp`` -> ``"7"``: the block's key in the expert layout."""
    (block,) = re.findall(r"layers\.(\d+)\.", module_name)
    return block


def count_image_tokens(model: PreTrainedModel) -> int:
    """Number of tokens of one image: its patches, plus the class token with the ``full`` feature strategy."""
    return _image_tokens(model.config)


def _image_tokens(shapes: Any) -> int:
    patches = (shapes.vision_config.image_size // shapes.vision_config.patch_size) ** 2
    return patches + (shapes.vision_feature_select_strategy == "full")


# ---- The base


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """The frozen base and, as an ``Encoder``, what turns records into its inputs.

    Attributes:
        image_token_count: tokens of every image of LLaVA-1.5; 0 if their number depends on the image.
        chat: what makes the inputs of other families, with their own template and processor.
        vision: cached image features.
        soft_tokens: places for soft prompt tokens after the first token of every text; they add to ``max_length``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor
    image_token_count: int
    fingerprint: str
    family: Family = LLAVA
    chat: Chat | None = None
    vision: VisionCache | None = None
    soft_tokens: int = 0

    def read_pixels(self, path: Path) -> Tensor:
        """An image file as the tower's input ``[3, H, W]`` float32."""
        return images.preprocess(images.load_image(path), self.image_processor)

    def read_image(self, path: Path) -> Any:
        """Pixels of an image file or, with ``vision``, its features ``[P, D]``, which must have been computed; the
        decoded image where the family's processor makes the pixels."""
        if self.chat is not None:
            return images.load_image(path)
        return self.read_pixels(path) if self.vision is None else self.vision.read(path)

    def train_item(self, record: TrainRecord, image: Any, max_length: int) -> TrainItem:
        """Raises ClmoeError like ``encode_training``."""
        if self.chat is not None:
            return self._opened(self.chat.train_item(record, image, max_length))
        if record.masked:
            ids = torch.tensor(encode_prompt("", False, self.tokenizer, self.image_token_count))
            return self._opened(TrainItem(ids, None, torch.full_like(ids, IGNORE)))
        encoded = encode_training(record, self.tokenizer, self.image_token_count, max_length)
        return self._opened(TrainItem(torch.tensor(encoded.input_ids), image, torch.tensor(encoded.labels)))

    def prompt_item(self, question: Question, image: Any) -> PromptItem:
        """Raises ClmoeError like ``encode_training``."""
        if self.chat is not None:
            return self._opened(self.chat.prompt_item(question.text, image))
        ids = encode_prompt(question.text, question.image is not None, self.tokenizer, self.image_token_count)
        return self._opened(PromptItem(torch.tensor(ids), image))

    def _opened(self, item: Item) -> Item:
        """The item with its open places; they carry no label and belong to the text."""
        if not self.soft_tokens:
            return item
        places = torch.arange(self.soft_tokens)

        def opened(row: Tensor, values: Tensor) -> Tensor:
            return torch.cat([row[:1], values, row[1:]])

        of_text = {name: row for name, row in item.extra.items() if name.endswith("token_type_ids")}
        extra = item.extra | {name: opened(row, torch.zeros_like(places)) for name, row in of_text.items()}
        labels = {"labels": opened(item.labels, torch.full_like(places, IGNORE))} if isinstance(item, TrainItem) else {}
        return replace(item, input_ids=opened(item.input_ids, SOFT + places), extra=extra, **labels)

    def check_fit(self, record: TrainRecord, max_length: int) -> None:
        """Raise ClmoeError if LLaVA-1.5's tokenizer does not fit its template; others were checked on loading."""
        if self.chat is None and not record.masked:
            encode_training(record, self.tokenizer, self.image_token_count, max_length)

    def answer_tokens(self, record: TrainRecord, image_root: Path, max_length: int) -> tuple[int, int]:
        """A record's answer tokens within ``max_length``, and beyond. Raises ClmoeError like ``encode_training``."""
        if self.chat is not None:
            return self.chat.answer_tokens(record, image_root, max_length)
        image_tokens = self.image_token_count if record.image is not None else 0
        text = render(record.turns, record.image is not None)[0]
        # A token is at least a byte, except for the marks of a beginning, so most records need not be encoded.
        if len(text.encode()) + image_tokens + 8 * len(record.turns) <= max_length:
            return 1, 0
        labels = encode_training(record, self.tokenizer, self.image_token_count, UNCUT).labels
        answers = [label != IGNORE for label in labels]
        return sum(answers[:max_length]), sum(answers[max_length:])

    @property
    def made_by(self) -> Any:
        """What makes its inputs, as JSON types, for the names of cached results."""
        return self.image_processor.to_dict() if self.chat is None else self.chat.made_by()

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        if self.chat is None:
            return [cast(int, self.tokenizer.eos_token_id)]
        stops = self.model.generation_config.eos_token_id
        return sorted({self.chat.end_id, *([stops] if isinstance(stops, int) else stops or [])})

    @property
    def encoder(self) -> "LoadedBase":
        """Itself without the model: loader workers get a copy."""
        return replace(self, model=cast(Any, None))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_base(config: ModelConfig, device: torch.device | str = "cpu") -> LoadedBase:
    """Load model, tokenizer and processor; all parameters frozen, in evaluation mode.

    Raises ClmoeError if the family has no row, the files are not in transformers' format, a tensor is missing or does
    not fit config.json, attention or 4-bit weights need something that is absent, or ``CLMOE_VISION`` does not fit the
    model, and as ``pieces.repaired`` and ``Chat.open`` do.
    """
    _check_means(config)
    disable_progress_bar()
    folder = resolve_model_path(config.path)
    fingerprint = base_fingerprint(folder)
    cached = _cached_only(folder)
    try:
        shapes = AutoConfig.from_pretrained(folder, **cached)
        family = family_of(shapes.model_type)
        if getattr(shapes.get_text_config(), "final_logit_softcapping", None):
            raise ValueError("its config.json has final_logit_softcapping, which neither loss nor answering applies")
        loaded = AutoModelForImageTextToText.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **cached,
            **tower_names(shapes.model_type),
            **(_few_bits(config, family, device) if config.load_in_4bit or config.load_in_8bit else {}),
        )
        model, report = cast(tuple[PreTrainedModel, dict[str, set[Any]]], loaded)
        _check_shards(Path(folder))
        _check_report(report)
        parts = _processor_parts(folder, shapes, family, cached)
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        raise _not_loaded(config, error) from error
    model.requires_grad_(False).eval()
    if not (config.load_in_4bit or config.load_in_8bit):  # quantised weights were placed while loading
        cast(nn.Module, model).to(device)
    _check_weights(model, Path(folder))
    model.name_or_path = config.path  # goes into adapter files, which must not depend on where the checkout is
    return LoadedBase(
        model=model,
        **parts,
        image_token_count=count_image_tokens(model) if family.vicuna else 0,
        fingerprint=fingerprint,
        vision=attach_cache(model, family, parts["image_processor"], fingerprint),
    )


def open_encoder(config: ModelConfig, *, offline: bool = False) -> LoadedBase:
    """A base's tokenizer and processor as ``load_base`` gives them, without its weights. Raises ClmoeError.

    With ``offline``, from a folder or the hub's cache alone.
    """
    folder = resolve_model_path(config.path)
    cached = {"local_files_only": True} if offline else _cached_only(folder)
    image_tokens = 0
    try:
        shapes = AutoConfig.from_pretrained(folder, **cached)
        family = family_of(shapes.model_type)
        image_tokens = _image_tokens(shapes) if family.vicuna else 0
        parts = _processor_parts(folder, shapes, family, cached)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise _not_loaded(config, error) from error
    return LoadedBase(model=cast(Any, None), image_token_count=image_tokens, fingerprint="", **parts)


def _not_loaded(config: ModelConfig, error: Exception) -> ClmoeError:
    return ClmoeError(f"model {config.path} cannot be loaded: {str(error).strip().splitlines()[0]}")


def _processor_parts(folder: str, shapes: PretrainedConfig, family: Family, cached: dict[str, Any]) -> dict[str, Any]:
    """Tokenizer and image processor; LLaVA-1.5's tokenizer as ``pieces.repaired`` leaves it."""
    if not family.vicuna:
        chat = Chat.open(open_processor(folder, shapes, **cached), family)
        parts = {"tokenizer": chat.tokenizer, "image_processor": chat.processor.image_processor}
        return {"family": family, "chat": chat, **parts}
    processor = AutoProcessor.from_pretrained(folder, **WITH_PILLOW, **cached)
    tokenizer = repaired(processor.tokenizer, Path(folder), shapes.image_token_id)
    return {"tokenizer": tokenizer, "image_processor": processor.image_processor}


def _cached_only(folder: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: a hub name is read from the cache alone if the hub is out of reach."""
    return {"local_files_only": not Path(folder).is_dir() and _hub_is_out_of_reach(folder)}


def _hub_is_out_of_reach(name: str) -> bool:
    """Ask once, without retries: transformers would try six times, for half a minute, before reading its cache."""
    if is_offline_mode():
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except Exception as error:  # the type of a lost connection depends on huggingface_hub's HTTP client
        return not isinstance(error, HfHubHTTPError)  # an answer from the hub, which transformers explains
    return False


def _check_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise ClmoeError, naming file and tensor, if a weight is NaN or infinite."""
    if all(is_finite(tensor) for tensor in model.state_dict().values()):
        return
    for file in sorted(folder.glob("*.safetensors")):
        load_tensors(file)
    raise ClmoeError(f"model {folder}: a weight is NaN or infinite in {model.dtype}: choose another model.dtype")


def shapes_file(config: ModelConfig) -> Path:
    """The model folder's config.json, else the file that ``architecture`` names, else the one in the hub's cache.

    Raises ClmoeError if none exists.
    """
    names = [f"{config.path}/config.json", *([config.architecture] if config.architecture else [])]
    for name in names:
        for file in (Path(name).expanduser(), shipped_root() / name):
            if file.is_file():
                return file
    if is_hub_name(config.path) and isinstance(kept := try_to_load_from_cache(config.path, "config.json"), str):
        return Path(kept)
    raise ClmoeError(
        f"model {config.path}: no file {' and no '.join(names)}, and nothing is downloaded: give --model a folder, a "
        f"name in the hub's cache or in configs/models ({', '.join(known_configs('models'))}), or set "
        "model.architecture to its config.json"
    )


def meta_base(file: Path) -> LoadedBase:
    """The shapes of a config.json on the meta device, in float32, without weights, tokenizer or processor.

    Raises ClmoeError for a family without a row, or for values that transformers cannot build a model from.
    """
    kind, values = _model_type(file), read_json(file)
    family = FAMILIES[kind]
    try:
        shapes = CONFIG_MAPPING[kind].from_dict(values)
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(shapes, dtype=torch.float32).requires_grad_(False)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError, LookupError) as error:
        raise ClmoeError(f"{file}: not a {kind} that transformers can build: {' '.join(str(error).split())}") from error
    absent = {"tokenizer": cast(Any, None), "image_processor": cast(Any, None)}
    tokens = count_image_tokens(model) if family.vicuna else 0
    return LoadedBase(model=model, image_token_count=tokens, fingerprint="", family=family, **absent)


def _model_type(file: Path) -> str:
    """What a config.json says. Raises ClmoeError for a family without a row."""
    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    try:
        family_of(kind)
    except ValueError as error:
        raise ClmoeError(f"{file}: {error}") from error
    return str(kind)


def _check_means(config: ModelConfig) -> None:
    """Raise ClmoeError if attention or 4-bit weights need a package or setting that is absent, before loading."""
    flash = config.attention == "flash_attention_2"
    if flash and not is_flash_attn_2_available():
        needs = "needs the package flash-attn and a CUDA device: pip install 'clmoe[flash]', or model.attention=sdpa"
        raise ClmoeError(f"model.attention flash_attention_2 {needs}")
    if flash and config.dtype == "float32":
        raise ClmoeError("model.attention flash_attention_2 computes in 16 bits: set model.dtype=bfloat16")
    bits = "4" if config.load_in_4bit else "8" if config.load_in_8bit else ""
    if bits and find_spec("bitsandbytes") is None:
        raise ClmoeError(f"model.load_in_{bits}bit needs the package bitsandbytes: pip install 'clmoe[4bit]'")


def _few_bits(config: ModelConfig, family: Family, device: torch.device | str) -> dict[str, Any]:
    """NF4 weights in the decoder blocks (QLoRA, arXiv 2305.14314), or 8-bit ones (LLM.int8, arXiv 2208.07339).

    As arguments of ``from_pretrained``. Tower, projector and head keep their type: a tuned projector is a copy of the
    base's, and the head decides margins.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=config.load_in_4bit,
        load_in_8bit=config.load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=[*(f"model.{name}" for name in (family.vision, *family.projector)), "lm_head"],
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def _check_report(report: dict[str, set[Any]]) -> None:
    """Raise ValueError with the first tensor that only the files or only the model have, or whose shapes differ."""
    for problem, keys in (("lack", "missing_keys"), ("have, besides the model's,", "unexpected_keys")):
        if names := sorted(report[keys]):
            raise ValueError(f"its files {problem} {len(names)} tensors, {names[0]} first")
    for name, found, needed in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} has shape {list(found)} in its files, but config.json makes it {list(needed)}")


def _check_shards(folder: Path) -> None:
    """Raise ValueError if a tensor is in two files of an index: transformers would take whichever it reads last."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file() or not index.is_file():
        return
    seen: set[str] = set()
    for name in sorted(set(read_json(index)["weight_map"].values())):
        with safe_open(folder / name, "pt") as shard:
            for tensor in shard.keys():  # noqa: SIM118 (not a dict)
                if tensor in seen:
                    raise ValueError(f"{name}: {tensor} is in another file as well")
                seen.add(tensor)


def base_fingerprint(folder: str) -> str:
    """sha256 over ``config.json`` and every weight file's name, size and sixteen evenly spaced MiB.

    Two trainings differ everywhere, so the sample tells them apart without reading 14 GB. For a hub name, it is the
    name's hash.
    """
    root, sample = Path(folder), 1 << 20
    if not root.is_dir():
        return hashlib.sha256(folder.encode()).hexdigest()
    weights = sorted(root.glob("*.safetensors"))
    if not weights or not (root / "config.json").is_file():
        if (root / "config.json").is_file():
            _model_type(root / "config.json")  # another model is the better reason to give
        raise ClmoeError(f"model {folder}: expected config.json and *.safetensors in it (transformers' format)")
    digest = hashlib.sha256((root / "config.json").read_bytes())
    for path in weights:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for k in range(16):
                file.seek(max(0, size - sample) * k // 15)
                digest.update(file.read(sample))
    return digest.hexdigest()
