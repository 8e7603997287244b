"""The decoding policy and the padding of images, checked against numpy."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clmoe.bases.stack import CLIPImageProcessorPil
from clmoe.data.images import load_image, preprocess
from clmoe.errors import ClmoeError

MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]
BACKGROUND = (122, 116, 104)  # int(mean * 255), as LLaVA computes it


def processor(size: int, crop: int | None = None, **changes: object) -> Any:
    side = crop or size
    crop_size = {"height": side, "width": side}
    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop_size, **changes)


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("height", "width"), [(56, 30), (30, 56), (31, 56), (56, 31), (1, 56), (56, 56)])
def test_every_pixel_of_a_non_square_image_survives(height: int, width: int) -> None:
    """Oracle: the picture in the middle of a square of BACKGROUND. The longer side is the input size, so nothing is
    rescaled, the oracle is exact, and a crop would show."""
    pixels = noise(height, width)
    square = np.full((56, 56, 3), BACKGROUND, dtype=np.uint8)
    top, left = (56 - height) // 2, (56 - width) // 2
    square[top : top + height, left : left + width] = pixels
    result = preprocess(Image.fromarray(pixels), processor(56))
    assert result.dtype == torch.float32
    assert result.is_contiguous()
    np.testing.assert_allclose(result.numpy(), ((square / 255 - MEAN) / STD).transpose(2, 0, 1), atol=2e-6)


@pytest.mark.parametrize(("size", "crop", "resize"), [(64, 56, True), (56, 64, True), (56, 56, False)])
def test_a_processor_that_would_crop_is_refused(size: int, crop: int, resize: bool) -> None:
    with pytest.raises(ClmoeError, match="crop_size"):
        preprocess(Image.fromarray(noise(56, 56)), processor(size, crop, do_resize=resize))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1", "CMYK"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(noise(8, 8)).convert("L" if mode == "LA" else "RGB").convert(mode)
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    image.save(path)
    np.testing.assert_array_equal(np.asarray(load_image(path)), np.asarray(image.convert("RGB")))
    assert preprocess(image, processor(8)).shape == (3, 8, 8)


def test_transparency_is_dropped_and_exif_rotation_not_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (10, 20, 30, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png").getpixel((0, 0)) == (10, 20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (6, 4)


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(mode: str, tmp_path: Path) -> None:
    image = Image.new(mode, (4, 4), 40000)
    image.save(tmp_path / "deep.tiff")
    with pytest.raises(ClmoeError, match=r"deep\.tiff"):
        load_image(tmp_path / "deep.tiff")
    with pytest.raises(ClmoeError, match=mode):
        preprocess(image, processor(8))


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(32, 32)).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("raw", [b"", b"hello", encoded("PNG")[:-200], encoded("JPEG")[:-200]])
def test_missing_and_broken_files_are_named(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(raw)
    for name in ("broken.png", "missing.png"):
        with pytest.raises(ClmoeError, match=name):
            load_image(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(65_000, 10), (10, 65_000), (10_000, 1), (13_378, 13_378)])
def test_an_image_that_would_fill_a_square_of_gigabytes_is_refused_before_decoding(
    width: int, height: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("1", (width, height)).save(tmp_path / "wide.png")
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ClmoeError, match=r"wide\.png: "):
        load_image(tmp_path / "wide.png")
    if width != height:
        with pytest.raises(ClmoeError, match=f"{width} x {height}"):
            preprocess(Image.new("1", (width, height)), processor(56))


def test_warnings_name_the_file_in_every_thread(tmp_path: Path) -> None:
    paths = [tmp_path / f"{n}.png" for n in range(40)]
    for number, path in enumerate(paths):
        picture = Image.new("P", (2, 2))
        picture.putpalette([0, 0, 0, 9, 9, 9])
        picture.save(path, **({"transparency": b"\x00\x80"} if number % 2 else {}))  # Pillow warns of such a palette
    before = warnings.showwarning
    with warnings.catch_warnings(record=True) as caught, ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("always")
        list(pool.map(load_image, paths))
    assert warnings.showwarning is before
    named = sorted(str(warning.message).split(": ")[0] for warning in caught)
    assert named == sorted(map(str, paths[1::2]))


def test_decompression_bombs_are_refused_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size in the header is enough to refuse the file, most of which is missing."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 32 * 32 // 2 - 1)
    (tmp_path / "bomb.png").write_bytes(encoded("PNG")[:60])
    with pytest.raises(ClmoeError, match=r"bomb\.png: .*1024 pixels"):
        load_image(tmp_path / "bomb.png")
