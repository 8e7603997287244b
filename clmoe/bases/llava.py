"""LLaVA-1.5, transformers' own class: loading, identity, inputs, the names of its parts, and kept vision features.

Everything else takes a base as a ``PreTrainedModel`` and finds its parts through the functions here.
"""

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from random import SystemRandom
from typing import Any, cast

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoProcessor,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.import_utils import is_flash_attn_2_available
from transformers.utils.logging import disable_progress_bar

from clmoe.bases.pieces import repaired
from clmoe.bases.stack import WITH_PILLOW, tower_names
from clmoe.config import ModelConfig
from clmoe.data import images
from clmoe.data.batches import Encoder
from clmoe.errors import ClmoeError
from clmoe.utils.files import file_sha256, json_sha256, read_json
from clmoe.utils.logging import Progress
from clmoe.utils.paths import known_configs, resolve_model_path, shipped_root
from clmoe.utils.processes import count, from_main, in_order, is_main
from clmoe.utils.tensors import is_finite, load_tensors, replace_tensors

PROJECTOR = "multi_modal_projector"
HUB_TIMEOUT = 5.0  # seconds


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The language model's decoder blocks."""
    return model.get_decoder().layers


def projector_of(model: PreTrainedModel) -> nn.Module:
    """What maps the vision tower's features to token embeddings."""
    return model.get_submodule(f"model.{PROJECTOR}")


def vision_tower_of(model: PreTrainedModel) -> nn.Module:
    """The image encoder."""
    return model.get_submodule("model.vision_tower")


def language_model_pattern(names: list[str]) -> str:
    """Regular expression for these modules of the decoder blocks (never the vision tower's): ``gate_proj``, ``mlp``."""
    return rf".*language_model\.layers\.\d+\.(mlp|self_attn|mlp\..+)?\.?({'|'.join(names)})"


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


# ---- The frozen tower's output for every image, kept on disk: later passes neither decode nor encode it again
#
# Opt-in: `CLMOE_VISION` names the folder, which all runs on one base may share (1.18 MB an image with LLaVA-1.5 in 16
# bits). Each image is computed alone, so what is kept does not depend on the others; a batch differs by rounding.

VARIABLE = "CLMOE_VISION"


class CachedTower(nn.Module):
    """A vision tower that encodes ``[I, 3, H, W]`` and passes kept features ``[I, P, D]`` on as those of ``layer``."""

    def __init__(self, tower: nn.Module, layer: int) -> None:
        super().__init__()
        self.tower, self.layer = tower, layer

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        if pixel_values.dim() == 4:
            return self.tower(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(hidden_states={self.layer: pixel_values})  # type: ignore[arg-type]

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """``[3, H, W]`` float32 -> states of ``layer`` ``[P, D]``, class token included, on the CPU, dtype kept."""
        weight = next(self.parameters())
        output = self.tower(pixels[None].to(weight.device, weight.dtype), output_hidden_states=True)
        return output.hidden_states[self.layer][0].cpu().contiguous()


@dataclass(frozen=True)
class VisionCache:
    """A folder of features of one tower, preprocessing and type: a file for each distinct image content."""

    folder: Path

    def path(self, image: Path) -> Path:
        """The file of an image's features, whether it exists or not."""
        status = image.stat()
        digest = _content(str(image), status.st_mtime_ns, status.st_size)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def read(self, image: Path) -> Tensor:
        """Features ``[P, D]`` of an image that ``fill`` was given. Raises ClmoeError with a damaged file's name."""
        return load_tensors(self.path(image))["features"]

    def fill(self, tower: nn.Module, images: Iterable[Path], read_pixels: Callable[[Path], Tensor]) -> None:
        """Compute what is missing; all processes call it. Raises ClmoeError: no such image, or the disk is full."""
        assert isinstance(tower, CachedTower)
        missing = from_main(lambda: self._missing(set(images)))
        if not missing:
            return
        with Progress("vision features", len(missing), []) as progress:

            def one(image: Path) -> int:
                progress.advance_rows(count())
                if self.path(image).is_file():  # by now: another run keeps its features here, too
                    return 0
                features = tower.features(read_pixels(image))
                replace_tensors({"features": features}, self.path(image))
                return features.nbytes

            sizes = in_order(missing, one)
        if is_main():
            text = f"{sum(map(bool, sizes)):,} images, {sum(sizes) / 2**20:,.1f} MiB added to {self.folder}"
            print(f"{VARIABLE}: vision features of {text}", file=sys.stderr)

    def _missing(self, images: Iterable[Path]) -> list[Path]:
        """One image for each content that has no file yet, shuffled: runs that start together share the work."""
        found: dict[Path, Path] = {}
        for image in sorted(images):
            if not image.is_file():
                raise ClmoeError(f"{image}: there is no such image")
            found.setdefault(self.path(image), image)
        missing = [image for path, image in found.items() if not path.is_file()]
        SystemRandom().shuffle(missing)
        return missing


@cache
def _content(image: str, modified: int, size: int) -> str:
    """Hash of a file, computed again only when its time or size has changed."""
    return file_sha256(Path(image))


def attach_cache(
    model: LlavaForConditionalGeneration, image_processor: BaseImageProcessor, fingerprint: str
) -> VisionCache | None:
    """The cache that the environment names; prepares the tower. Raises ClmoeError if several layers are read."""
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise ClmoeError(f"{VARIABLE}: the model reads the tower's layers {layer}; only one can be kept. Unset it")
    model.model.vision_tower = CachedTower(model.model.vision_tower, layer)
    what = [fingerprint, layer, str(model.dtype), image_processor.to_dict()]
    return VisionCache(Path(root) / json_sha256(what)[:16])


# ---- The base


@dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """The frozen base and, as an ``Encoder``, what turns records into its inputs; ``vision``: kept image features."""

    model: LlavaForConditionalGeneration
    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor
    image_token_count: int
    fingerprint: str
    vision: VisionCache | None = None

    def read_pixels(self, path: Path) -> Tensor:
        """An image file as the tower's input ``[3, H, W]`` float32."""
        return images.preprocess(images.load_image(path), self.image_processor)

    def read_image(self, path: Path) -> Tensor:
        """Pixels of an image file or, with ``vision``, its features ``[P, D]``, which must have been computed."""
        return self.read_pixels(path) if self.vision is None else self.vision.read(path)

    @property
    def encoder(self) -> Encoder:
        """Itself without the model: loader workers get a copy."""
        return replace(self, model=cast(Any, None))

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype


def load_base(config: ModelConfig, device: torch.device | str = "cpu") -> LoadedBase:
    """Load model, tokenizer and image processor; all parameters frozen, evaluation mode.

    Raises ClmoeError: not a LLaVA in transformers' format, a tensor is missing or does not fit config.json, attention
    or 4-bit weights need something that is absent, ``CLMOE_VISION`` does not fit the model, or as ``pieces.repaired``.
    """
    _check_means(config, torch.device(device))
    disable_progress_bar()
    folder = resolve_model_path(config.path)
    fingerprint = base_fingerprint(folder)
    cached = _cached_only(folder)
    try:
        kind = AutoConfig.from_pretrained(folder, **cached).model_type
        if kind != "llava":  # for which from_pretrained below would build a random LLaVA of 7B parameters
            raise ValueError(f"its config.json says model_type {kind!r}, not 'llava'")
        loaded = LlavaForConditionalGeneration.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            use_safetensors=True,  # a pickle could run code
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, by name
            **cached,
            **tower_names(kind),
            **(_four_bit(config, device) if config.load_in_4bit else {}),
        )
        model, report = cast(tuple[LlavaForConditionalGeneration, dict[str, set[Any]]], loaded)
        _check_report(report)
        parts = _processor_parts(folder, model.config.image_token_id, cached)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClmoeError(f"model {config.path} cannot be loaded: {reason}") from error
    model.requires_grad_(False).eval()
    if not config.load_in_4bit:  # quantised weights were placed while loading
        cast(nn.Module, model).to(device)
    _check_weights(model, Path(folder))
    model.name_or_path = config.path  # goes into adapter files, which must not depend on where the checkout is
    return LoadedBase(
        model=model,
        **parts,
        image_token_count=count_image_tokens(model),
        fingerprint=fingerprint,
        vision=attach_cache(model, parts["image_processor"], fingerprint),
    )


def open_encoder(config: ModelConfig) -> LoadedBase:
    """A base's tokenizer and image processor as ``load_base`` gives them, without its weights. Raises ClmoeError."""
    folder = resolve_model_path(config.path)
    cached = _cached_only(folder)
    try:
        shapes = AutoConfig.from_pretrained(folder, **cached)
        image_tokens = _image_tokens(shapes)
        parts = _processor_parts(folder, shapes.image_token_id, cached)
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ClmoeError(f"model {config.path} cannot be loaded: {reason}") from error
    return LoadedBase(model=cast(Any, None), image_token_count=image_tokens, fingerprint="", **parts)


def _processor_parts(folder: str, image_id: int, cached: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer, as ``pieces.repaired`` leaves it, and the image processor."""
    processor = AutoProcessor.from_pretrained(folder, **WITH_PILLOW, **cached)
    tokenizer = repaired(processor.tokenizer, Path(folder), image_id)
    return {"tokenizer": tokenizer, "image_processor": processor.image_processor}


def _cached_only(folder: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained``: a hub name that cannot be asked is read from the cache alone."""
    return {"local_files_only": not Path(folder).is_dir() and _hub_is_out_of_reach(folder)}


def _hub_is_out_of_reach(name: str) -> bool:
    """Asked once, without retries: transformers would try six times, for half a minute, before it reads its cache."""
    if is_offline_mode():
        return True
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=HUB_TIMEOUT)
    except Exception as error:  # the type of a lost connection depends on huggingface_hub's HTTP client
        return not isinstance(error, HfHubHTTPError)  # an answer of the hub, which transformers explains
    return False


def _check_weights(model: PreTrainedModel, folder: Path) -> None:
    """Raise ClmoeError, naming file and tensor, if a weight is NaN or infinite."""
    if all(is_finite(tensor) for tensor in model.state_dict().values()):
        return
    for file in sorted(folder.glob("*.safetensors")):
        load_tensors(file)
    raise ClmoeError(f"model {folder}: a weight is NaN or infinite in {model.dtype}: choose another model.dtype")


def shapes_file(config: ModelConfig) -> Path:
    """The model folder's config.json, or the file that ``architecture`` names. Raises ClmoeError: neither exists."""
    names = [f"{config.path}/config.json", *([config.architecture] if config.architecture else [])]
    for name in names:
        for file in (Path(name).expanduser(), shipped_root() / name):
            if file.is_file():
                return file
    raise ClmoeError(
        f"model {config.path}: no file {' and no '.join(names)}, and nothing is downloaded: give --model a folder or a "
        f"name in configs/models ({', '.join(known_configs('models'))}), or set model.architecture to its config.json"
    )


def meta_base(file: Path) -> LoadedBase:
    """The shapes of a LLaVA's config.json (else ClmoeError) on the meta device, without weights and tokenizer."""
    values = _llava_values(file)
    try:
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig.from_dict(values)).requires_grad_(False)
    except (StrictDataclassError, ValueError, TypeError, ArithmeticError, RuntimeError) as error:
        raise ClmoeError(f"{file}: not a LLaVA that transformers can build: {' '.join(str(error).split())}") from error
    absent = {"tokenizer": cast(Any, None), "image_processor": cast(Any, None)}
    return LoadedBase(model=model, image_token_count=count_image_tokens(model), fingerprint="", **absent)


def _llava_values(file: Path) -> dict[str, Any]:
    """A LLaVA's config.json. Raises ClmoeError for another model."""
    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != "llava":
        convert = "; clmoe convert makes one of it" if kind in ("llava_llama", "llama") else ""
        raise ClmoeError(f"{file}: field 'model_type': expected 'llava' (LLaVA-1.5), found {kind!r}{convert}")
    return values


def _check_means(config: ModelConfig, device: torch.device) -> None:
    """Raise ClmoeError if attention or 4-bit weights need a package or setting that is absent, before loading."""
    flash = config.attention == "flash_attention_2"
    if flash and not is_flash_attn_2_available():
        needs = "needs the package flash-attn and a CUDA device: pip install 'clmoe[flash]', or model.attention=sdpa"
        raise ClmoeError(f"model.attention flash_attention_2 {needs}")
    if flash and config.dtype == "float32":
        raise ClmoeError("model.attention flash_attention_2 computes in 16 bits: set model.dtype=bfloat16")
    if config.load_in_4bit and find_spec("bitsandbytes") is None:
        raise ClmoeError("model.load_in_4bit needs the package bitsandbytes: pip install 'clmoe[4bit]'")
    if config.load_in_4bit and device.type != "cuda":
        raise ClmoeError(f"model.load_in_4bit needs a CUDA device, this process computes on {device.type}")


def _four_bit(config: ModelConfig, device: torch.device | str) -> dict[str, Any]:
    """NF4 weights in the decoder blocks (QLoRA, arXiv 2305.14314), as arguments of ``from_pretrained``.

    Tower, projector and head keep their type: a tuned projector is a copy of the base's, and the head decides margins.
    """
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, config.dtype),
        llm_int8_skip_modules=["model.vision_tower", f"model.{PROJECTOR}", "lm_head"],
    )
    return {"quantization_config": quantisation, "device_map": {"": device}}


def _check_report(report: dict[str, set[Any]]) -> None:
    """Raise ValueError with the first tensor that only the files or only the model have, or whose shapes differ."""
    for problem, keys in (("lack", "missing_keys"), ("hold, beyond the model's,", "unexpected_keys")):
        if names := sorted(report[keys]):
            raise ValueError(f"its files {problem} {len(names)} tensors, {names[0]} first")
    for name, found, needed in sorted(report["mismatched_keys"]):
        raise ValueError(f"{name} has shape {list(found)} in its files, config.json makes it {list(needed)}")


def base_fingerprint(folder: str) -> str:
    """sha256 over ``config.json`` and every weight file's name, size and sixteen evenly spaced MiB.

    Trainings differ everywhere, so the sample tells them apart without reading 14 GB. A hub name gives the name's hash.
    """
    root, sample = Path(folder), 1 << 20
    if not root.is_dir():
        return hashlib.sha256(folder.encode()).hexdigest()
    weights = sorted(root.glob("*.safetensors"))
    if not weights or not (root / "config.json").is_file():
        if (root / "config.json").is_file():
            _llava_values(root / "config.json")  # another model is the better reason
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
