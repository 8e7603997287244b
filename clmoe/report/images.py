"""Small copies of the images that test questions ask about, as data URIs for a page without further files.

Predictions name an image relative to its task's image folder. That folder is looked for, in this order: under the data
folder given to the report; where the runs' `events.jsonl` say that it was at the evaluation; where the benchmark of
that name has it in this checkout.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from clmoe.benchmarks.base import load_benchmark
from clmoe.data.records import misplaced
from clmoe.errors import ClmoeError
from clmoe.report.run import Run
from clmoe.utils.logging import read_events

SIDE = 224  # pixels of the longer side
_LOSSLESS_UP_TO = 128  # drawn or tiny images, which lossy compression would smear
MISSING, UNREADABLE = "image file not found", "image file cannot be read"


@dataclass
class Thumbnails:
    """The data URIs embedded so far, each image once, and the folders to look in by task."""

    folders: dict[str, list[Path]]
    uris: list[str] = field(default_factory=list)
    _seen: dict[tuple[str, str], int | str] = field(default_factory=dict)

    def add(self, task: str, image: str) -> int | str:
        """The image's number in `uris`, or the reason why there is none."""
        key = (task, image)
        if key not in self._seen:
            self._seen[key] = self._embed(task, image)
        return self._seen[key]

    def _embed(self, task: str, image: str) -> int | str:
        if misplaced(image):  # a page that is passed on holds nothing else of this machine
            return MISSING
        path = next((folder / image for folder in self.folders.get(task, []) if (folder / image).is_file()), None)
        if path is None:
            return MISSING
        try:
            uri = data_uri(path)
        except Exception:  # Pillow's decoders raise many types; a report stands without one picture
            return UNREADABLE
        if uri not in self.uris:
            self.uris.append(uri)
        return self.uris.index(uri)


def data_uri(path: Path) -> str:
    """The image scaled down to at most `SIDE` pixels, as WebP."""
    with Image.open(path) as image:
        small = image.convert("RGB")
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "WEBP", lossless=max(small.size) <= _LOSSLESS_UP_TO, quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode("ascii")


def image_folders(runs: Sequence[Run], data: Path | None) -> dict[str, list[Path]]:
    """Folders that may hold the images of each task, best first; `data` is the benchmark's data folder, if given."""
    recorded = [place for run in runs for place in _recorded(run)]
    folders = {}
    for task in runs[0].order:
        places = [(Path(root), images) for name, root, images in recorded if name == task]
        found = [] if data is None else [data / images for _, images in places]
        found += [root / images for root, images in places]
        found += _of_benchmark(runs[0].benchmark, task, data)
        folders[task] = list(dict.fromkeys(found))
    return folders


def _recorded(run: Run) -> list[tuple[str, str, str]]:
    """(task, data folder, image folder below it) of each evaluation."""
    places = []
    for event in read_events(run.path / "events.jsonl"):
        if event["event"] == "evaluated" and "data" in event:
            task = next((name for name in run.order if event["task"] in (name, *_stems(name))), None)
            places += [] if task is None else [(task, event["data"], event["images"])]
    return list(dict.fromkeys(places))


def _stems(task: str) -> list[str]:
    return [f"{task}.{router}" for router in ("oracle", "last", "random")]


def _of_benchmark(name: str, task: str, data: Path | None) -> list[Path]:
    try:
        return [load_benchmark(name, data, check_files=False).task(task).image_root]
    except ClmoeError:  # a benchmark of the user's own, given by its path at that time
        return []
