"""The frozen tower's output for every image, kept on disk: later passes neither decode nor encode the image again.

Opt-in, and LLaVA-1.5 only: `CLMOE_VISION` names the folder, which all runs on one base may share (1.18 MB per image
with LLaVA-1.5 in 16 bits). Each image is computed alone, so what is kept does not depend on the others; a batch would
differ by rounding.
"""

import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import SystemRandom
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clmoe.bases.families import Family
from clmoe.errors import ClmoeError
from clmoe.utils.files import file_sha256, json_sha256
from clmoe.utils.logging import Progress
from clmoe.utils.processes import count, from_main, in_order, is_main
from clmoe.utils.tensors import load_tensors, replace_tensors

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
    """A folder of features of one tower, preprocessing and dtype, with one file per distinct image content."""

    folder: Path

    def path(self, image: Path) -> Path:
        """The file of an image's features, whether it exists or not."""
        status = image.stat()
        digest = _content(str(image), status.st_mtime_ns, status.st_size)
        return self.folder / digest[:2] / f"{digest}.safetensors"

    def read(self, image: Path) -> Tensor:
        """Features ``[P, D]`` of an image that ``fill`` was given. Raises ClmoeError naming a damaged file."""
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
                if self.path(image).is_file():  # by now: another run also keeps its features here
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
    model: PreTrainedModel, family: Family, image_processor: BaseImageProcessor, fingerprint: str
) -> VisionCache | None:
    """The cache that the environment names; prepares the tower. Raises ClmoeError if it cannot serve this model."""
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    if not family.vicuna:
        raise ClmoeError(
            f"{VARIABLE}: vision features are kept for LLaVA-1.5 only, not {model.config.model_type}. Unset it"
        )
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int):
        raise ClmoeError(f"{VARIABLE}: the model reads the tower's layers {layer}; only one can be kept. Unset it")
    model.model.vision_tower = CachedTower(model.model.vision_tower, layer)
    what = [fingerprint, layer, str(model.dtype), image_processor.to_dict()]
    return VisionCache(Path(root) / json_sha256(what)[:16])
