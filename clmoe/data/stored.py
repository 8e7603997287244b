"""Large training files: records in an Arrow file on disk, memory-mapped, so that they are no Python objects.

The file is made once from the JSON, validated as it is read, and lies in ``$CLMOE_CACHE`` (default
``~/.cache/clmoe``) under ``records/``. Its name is a hash of the JSON's content and of the image folder, so that a
changed file is read and validated anew. Whether the images are still there is not looked up again; a missing one is an
error when it is read. The folder may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from clmoe.data.records import LookedUpRecords, TrainRecord, Turn, iterate_train
from clmoe.utils.files import file_sha256, flush, json_sha256

CACHE_VARIABLE = "CLMOE_CACHE"
_FORMAT = 1
_BATCH = 4096
_TURN = pa.struct([pa.field("question", pa.string()), pa.field("answer", pa.string())])
_SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("image", pa.string()), pa.field("turns", pa.list_(_TURN))])


class StoredRecords(LookedUpRecords):
    """The records of an Arrow file; each is made when it is asked for. Pickled, it is the file's name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return self._table.num_rows

    def record(self, position: int) -> TrainRecord:
        return _record(self._table.slice(position, 1).to_pylist()[0])

    def __iter__(self) -> Iterator[TrainRecord]:
        for batch in self._table.to_batches(max_chunksize=_BATCH):
            yield from map(_record, batch.to_pylist())

    def __reduce__(self) -> tuple[type[StoredRecords], tuple[Path]]:
        return StoredRecords, (self.path,)


def stored_train(path: Path, image_root: Path) -> StoredRecords:
    """The records of a training file from the cache, where they are put on first use.

    Processes that start together wait for the one that makes the file.

    Raises ClmoeError at the first bad row.
    """
    target = cache_folder() / "records" / f"{_key(path, image_root)}.arrow"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _write(iterate_train(path, image_root), target)
    return StoredRecords(target)


def cache_folder() -> Path:
    """Where files are kept that can be made again."""
    return Path(os.environ.get(CACHE_VARIABLE) or "~/.cache/clmoe").expanduser()


def _key(path: Path, image_root: Path) -> str:
    return json_sha256([_FORMAT, file_sha256(path), str(Path(image_root).absolute())])[:32]


def _write(records: Iterator[TrainRecord], target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial")
    with pa.OSFile(str(partial), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        while batch := list(islice(records, _BATCH)):
            writer.write_batch(pa.RecordBatch.from_pylist([_row(record) for record in batch], schema=_SCHEMA))
    flush(partial)
    partial.replace(target)


def _row(record: TrainRecord) -> dict[str, Any]:
    turns = [{"question": turn.question, "answer": turn.answer} for turn in record.turns]
    return {"id": record.id, "image": record.image, "turns": turns}


def _record(row: dict[str, Any]) -> TrainRecord:
    turns = tuple(Turn(turn["question"], turn["answer"]) for turn in row["turns"])
    return TrainRecord(row["id"], row["image"], turns)
