"""From an image file to the vision tower's input: one path for training and evaluation.

As in LLaVA-1.5, transparency is dropped, not blended, an animation gives its first frame, and no EXIF rotation is
applied: boxes of the benchmarks refer to the stored pixels. A non-square image is padded to a square and never cropped;
published evaluation scripts crop what training padded, which moves boxes.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from clmoe.errors import ClmoeError


def load_image(path: Path) -> Image.Image:
    """Decode as RGB. Raises ClmoeError if that fails, or for more than 8 bits per channel or 179 megapixels."""
    try:
        with Image.open(path) as image:
            return to_rgb(image, str(path))
    except ClmoeError:
        raise
    # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, ...) for one cause.
    except Exception as error:
        raise ClmoeError(f"{path}: cannot be decoded as an image ({error}); replace the file") from error


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The image as 8-bit RGB. Raises ClmoeError with its name if converting would clip more than 8 bits per channel."""
    if image.mode.split(";")[0] in ("I", "F"):
        raise ClmoeError(f"{name}: mode {image.mode} has more than 8 bits per channel; convert it to 8-bit RGB")
    return image.convert("RGB")


def preprocess(image: Image.Image, image_processor: Any) -> torch.Tensor:
    """Pad with the processor's mean colour, then let the processor resize and normalise: ``[3, H, W]`` float32.

    As in LLaVA-1.5's ``expand2square``, an odd remainder puts the extra line on the right or at the bottom. Raises
    ClmoeError if the processor would crop the padded square.
    """
    if getattr(image_processor, "do_center_crop", False):  # harmless only if it keeps the whole resized square
        size, crop = dict(image_processor.size), dict(image_processor.crop_size)
        sides, kept = ({s.get(key) for key in ("shortest_edge", "height", "width")} - {None} for s in (size, crop))
        if not image_processor.do_resize or len(sides) != 1 or sides != kept:
            found = f"resizes to {size} (do_resize {image_processor.do_resize}), crops to {crop}"
            fix = "so it would cut the image; set 'size' and 'crop_size' to the same length"
            raise ClmoeError(f"image processor: {found}, {fix}")
    side = max(image.size)
    width, height = (side - length for length in image.size)
    border = (width // 2, height // 2, width - width // 2, height - height // 2)
    background = tuple(int(value * 255) for value in image_processor.image_mean)
    square = ImageOps.expand(to_rgb(image), border, background)
    return image_processor(images=square, return_tensors="pt")["pixel_values"][0].to(torch.float32).contiguous()
