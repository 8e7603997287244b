"""From an image file to the vision tower's input: one path for training and evaluation.

As in LLaVA-1.5, transparency is dropped, not blended, an animation gives its first frame, and no EXIF rotation is
applied: the benchmarks' boxes refer to the stored pixels. A non-square image is padded to a square and never cropped;
published evaluation scripts crop what training padded, which moves boxes.
"""

import io
import threading
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from clmoe.errors import ClmoeError

LONGEST_SIDE = 13_377  # its square has 179 megapixels, the most that Pillow decodes
MOST_DRAWN_OUT = 300  # longer side / shorter side: beyond it, less than one line of pixels is left at LLaVA-1.5's 336


def load_image(path: Path) -> Image.Image:
    """Decode as RGB; Pillow's warnings name the file.

    Raises ClmoeError if that fails, for more than 8 bits per channel or 179 megapixels, and as ``check_shape`` does.
    """
    with _named_warnings(path):
        try:
            with Image.open(path) as image:
                check_shape(image, str(path))
                return to_rgb(image, str(path))
        except ClmoeError:
            raise
        # Pillow's decoders raise many types (OSError, SyntaxError, struct.error, ...) for one cause.
        except Exception as error:
            raise ClmoeError(f"{path}: cannot be decoded as an image ({error}); replace the file") from error


def ending(data: bytes, *, decode: bool) -> str:
    """What the name of a file with this encoded image ends in, as ``png``. Raises ClmoeError as ``load_image`` does.

    Without ``decode``, only the header is read.
    """
    try:
        with _named_warnings(Path("image")), Image.open(io.BytesIO(data)) as image:
            check_shape(image)
            _check_depth(image, "image")
            if decode:
                image.convert("RGB")
            return str(image.format).lower()
    except ClmoeError:
        raise
    except UnidentifiedImageError as error:
        raise ClmoeError("it has no known format") from error
    except Exception as error:
        raise ClmoeError(str(error)) from error


def size_of(path: Path) -> tuple[int, int]:
    """Width and height; only the header is read. Raises ClmoeError naming the file if that fails."""
    if (error := _header_problem(path)) is not None:
        raise error
    with Image.open(path) as image:
        return image.size


def unreadable(paths: Iterable[Path]) -> list[ClmoeError]:
    """What is wrong with these files: not an image, cannot be opened, or a bad shape. Reads only the header, once."""
    new = sorted(path for path in set(paths) if hash(path) not in _readable)
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(_header_problem, new))
    _readable.update(hash(path) for path, error in zip(new, found, strict=True) if error is None)
    return [error for error in found if error is not None]


_readable: set[int] = set()  # hashes of the paths that this process has opened: a sequence has a million


def _header_problem(path: Path) -> ClmoeError | None:
    try:
        with _named_warnings(path), Image.open(path) as image:
            check_shape(image, str(path))
            _check_depth(image, str(path))
    except ClmoeError as error:
        return error
    except Exception as error:
        return ClmoeError(f"{path}: cannot be read as an image ({error}); replace the file")
    return None


_warned = threading.local()
_lock = threading.Lock()
_reading: list[warnings.catch_warnings] = []  # one entry for each image that is being read; the first one listens


@contextmanager
def _named_warnings(path: Path) -> Iterator[None]:
    """Repeat this thread's warnings afterwards, with the file's name. Python's own recorder is not thread-safe."""
    with _lock:
        listener = warnings.catch_warnings()
        if not _reading:
            listener.__enter__()
            elsewhere = warnings.showwarning

            def show(message: Warning | str, *args: Any, **kwargs: Any) -> None:
                here = getattr(_warned, "messages", None)
                elsewhere(message, *args, **kwargs) if here is None else here.append(str(message))

            warnings.simplefilter("always")
            warnings.showwarning = show
        _reading.append(listener)
    _warned.messages = []
    try:
        yield
    finally:
        messages, _warned.messages = _warned.messages, None
        with _lock:
            first = _reading[0]
            _reading.pop()
            if not _reading:
                first.__exit__(None, None, None)
    for message in dict.fromkeys(messages):
        warnings.warn(f"{path}: {message}", stacklevel=4)


def check_shape(image: Image.Image, name: str = "image") -> None:
    """Raise ClmoeError, with the image's name, if the square around it is too large or would show nothing of it."""
    longer, shorter = max(image.size), min(image.size)
    if longer > LONGEST_SIDE or longer > MOST_DRAWN_OUT * shorter:
        size, fix = f"{image.size[0]} x {image.size[1]} pixels", "crop it or scale it down"
        limits = f"at most {LONGEST_SIDE} on a side, and {MOST_DRAWN_OUT} times as long as wide"
        raise ClmoeError(f"{name}: {size} would be padded to a square of {longer} x {longer} ({limits}): {fix}")


def to_rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """The image as 8-bit RGB. Raises ClmoeError with its name if converting would clip more than 8 bits per channel."""
    _check_depth(image, name)
    return image.convert("RGB")


def _check_depth(image: Image.Image, name: str) -> None:
    if image.mode.split(";")[0] in ("I", "F"):
        raise ClmoeError(f"{name}: mode {image.mode} has more than 8 bits per channel; convert it to 8-bit RGB")


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
    check_shape(image)
    side = max(image.size)
    width, height = (side - length for length in image.size)
    border = (width // 2, height // 2, width - width // 2, height - height // 2)
    background = tuple(int(value * 255) for value in image_processor.image_mean)
    square = ImageOps.expand(to_rgb(image), border, background)
    return image_processor(images=square, return_tensors="pt")["pixel_values"][0].to(torch.float32).contiguous()
