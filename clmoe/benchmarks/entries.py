"""Reading other people's JSON objects, with errors that name file, id and field."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clmoe.data.json_rows import read_json_strictly, shown
from clmoe.errors import ClmoeError

if TYPE_CHECKING:
    from clmoe.data.records import Failed, Question


def entries(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ClmoeError if it holds something else."""
    data = read_json_strictly(file)
    if not isinstance(data, dict):
        raise ClmoeError(f"{file}: expected a JSON object at the top level, found {shown(data)}")
    return data


def entry(file: Path, rows: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object of a question. Raises ClmoeError naming file and id if there is none."""
    row = rows.get(name)
    if not isinstance(row, dict):
        raise ClmoeError(f"{file}: no entry for question_id {name!r}; take questions and gold file of the same release")
    return row


def listed(file: Path, field: str, row: Mapping[str, Any], name: str | None = None) -> list[Any]:
    """A list that is not empty. Raises ClmoeError naming file, id and field."""
    value = row.get(field)
    if not isinstance(value, list) or not value:
        where = f"{file}" + (f": id {name!r}" if name is not None else "")
        raise ClmoeError(f"{where}: field '{field}': expected a list with something in it, found {shown(value)}")
    return value


def answered_one_by_one(
    questions: Sequence[Question], answered: Callable[[Question], Question], failed: Failed | None
) -> list[Question]:
    """Each question as ``answered`` returns it. With ``failed``, errors are told to it and their questions left out."""
    result = []
    for question in questions:
        try:
            result.append(answered(question))
        except ClmoeError as error:
            if failed is None:
                raise
            failed(error)
    return result
