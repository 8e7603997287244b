"""A run's answers right after each task and at the end, and which of them a page shows with their images."""

import base64
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
from PIL import Image

from clmoe.data.rows import misplaced
from clmoe.errors import ClmoeError
from clmoe.locators import LOCATORS
from clmoe.report.runs import Group, Run
from clmoe.utils.files import read_json
from clmoe.utils.logging import read_events

RIGHT = 0.5  # a score of at least this: VQA's consensus and science's lists give partial points
OUTCOMES: dict[tuple[Any, Any], str] = {  # right then, right at the end -> outcome
    (True, True): "kept",
    (True, False): "forgotten",
    (False, True): "learned later",
    (False, False): "never right",
}
_FIELDS: dict[str, tuple[type, ...]] = dict.fromkeys(("question_id", "prompt", "text", "answer"), (str,))
_FIELDS |= {"score": (int, float), "image": (str, type(None)), "task": (str, type(None))}
PER_TASK = 24
FORGOTTEN_SHARE = 0.75  # of a task's shown questions, as far as there are any
LONGEST = 1000  # characters of a question or answer
SIDE = 224  # pixels of an image's longer side
_LOSSLESS_UP_TO = 128  # drawn or tiny images, which lossy compression would smear


@lru_cache(maxsize=1024)  # several sections read them; every report reads the run again
def read_answers(run: Run, task: str) -> pd.DataFrame:
    """All questions of a task that were asked then or at the end, one row each; not to be changed.

    Columns: label, seed, task, question, image, prompt, reference, located (the task it was assigned to at the end),
    then, now (texts), then_score, now_score, then_right, now_right (None if not judged, as for captions), outcome (of
    `OUTCOMES`, or None).
    """
    folder = run.path / "predictions"
    cells = [folder / after / name for after in run.order for name in run.order]
    ending = next((end for end in _endings(run) if any(Path(f"{cell}{end}.jsonl").is_file() for cell in cells)), "")
    then, now = (_read(folder / after / f"{task}{ending}.jsonl") for after in (task, run.order[-1]))
    rows = []
    for name in now | then:
        first, last = then.get(name, {}), now.get(name, {})
        asked = last or first
        row = {"label": run.label, "seed": run.seed, "task": task, "question": name, "image": asked["image"]}
        row |= {"prompt": _clip(asked["prompt"]), "reference": _clip(asked["answer"]), "located": last.get("task")}
        for when, given in (("then", first), ("now", last)):
            right = given.get("right")
            row |= {when: _clip(given["text"]) if given else None, f"{when}_right": right}
            row |= {f"{when}_score": None if right is None else given["score"]}
        rows.append(row | {"outcome": OUTCOMES.get((first.get("right"), last.get("right")))})
    return pd.DataFrame(rows, dtype=object)


def explore(groups: Sequence[Group], number: int = PER_TASK) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Outcomes by label and task, summed over the seeds, and the answers to the chosen questions of each task.

    The counts leave out each run's last task, whose two answers are the same. The answers are those of `read_answers`,
    with `asked`, the task's number of questions.
    """
    counts, chosen = [pd.DataFrame(columns=["label", "task", *OUTCOMES.values()])], []
    runs = [run for group in groups for run in group.runs]
    for task in runs[0].order:
        frames = {run: frame for run in runs if len(frame := read_answers(run, task))}
        if not frames:
            continue
        answers = pd.concat(frames.values())
        twice = pd.concat([answers[:0], *(frame for run, frame in frames.items() if run.order[-1] != task)])
        found = twice.groupby(["label", "task"], sort=False)["outcome"].value_counts().unstack()
        counts.append(found.reindex(columns=list(OUTCOMES.values())).fillna(0).astype(int).reset_index())
        places = {name: place for place, name in enumerate(choose(answers, number))}
        answers = answers.assign(place=answers["question"].map(places), asked=answers["question"].nunique())
        chosen.append(answers.dropna(subset="place"))
    filled = [frame for frame in counts if len(frame)] or counts
    return pd.concat(filled), pd.concat(chosen).sort_values("place", kind="stable") if chosen else pd.DataFrame()


def majority_shares(groups: Sequence[Group]) -> pd.Series:
    """By task, percent of its test questions with the most frequent expected answer: what knowing only that gives.

    This is as far as a run's predictions show it; tasks that are scored as a whole, such as captions, have none.
    """
    shares, runs = {}, [run for group in groups for run in group.runs]
    for task in runs[0].order:
        for frame in (read_answers(run, task) for run in runs):
            if len(frame) and frame[["then_right", "now_right"]].notna().any(axis=None):
                shares[task] = 100 * frame["reference"].value_counts(normalize=True).iloc[0]
                break
    return pd.Series(shares, dtype=float)


def choose(answers: pd.DataFrame, number: int) -> list[str]:
    """Questions of a task to show, in a pseudo-random order that depends only on their names.

    Up to `FORGOTTEN_SHARE` are forgotten ones, each label's in turn; the others come from all, those asked twice first.
    """
    names = [f"{row.task}:{row.question}".encode("utf-8", "replace") for row in answers.itertuples()]
    ranks = answers.assign(rank=[hashlib.sha256(name).digest() for name in names])
    ranks = ranks.assign(once=~ranks["question"].isin(ranks["question"][ranks["outcome"].notna()])).sort_values("rank")
    forgotten = ranks[ranks["outcome"] == "forgotten"].drop_duplicates(["label", "question"])
    turns = forgotten.assign(turn=forgotten.groupby("label").cumcount()).sort_values("turn", kind="stable")
    chosen = list(turns["question"].drop_duplicates()[: int(FORGOTTEN_SHARE * number)])
    rest = ranks.sort_values("once", kind="stable")["question"].drop_duplicates()
    chosen += list(rest[~rest.isin(chosen)][: number - len(chosen)])
    return [name for name in rest if name in chosen]


def thumbnail(image: str, folders: Iterable[Path]) -> tuple[str | None, str]:
    """A small copy of an image as a data URI, or None and the reason why there is none."""
    # A path that leaves the folder is not followed: a page that is passed on holds no other picture from this machine.
    path = None if misplaced(image) else next((f / image for f in folders if (f / image).is_file()), None)
    if path is None:
        return None, "image file not found"
    try:
        with Image.open(path) as opened:
            small = opened.convert("RGB")
    except Exception:  # Pillow's decoders raise many types; the page says which image is broken
        return None, "image file cannot be read"
    small.thumbnail((SIDE, SIDE))
    content = io.BytesIO()
    small.save(content, "WEBP", lossless=max(small.size) <= _LOSSLESS_UP_TO, quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode("ascii"), ""


def image_folders(groups: Sequence[Group], data: Path | None) -> dict[str, list[Path]]:
    """Folders that may hold each task's images, best first: below `data`, then where they were at the evaluation."""
    folders: dict[str, list[Path]] = {task: [] for task in groups[0].runs[0].order}
    runs = [run for group in groups for run in group.runs]
    tasks = {f"{task}{ending}": task for task in folders for run in runs for ending in _endings(run)}
    events = [event for run in runs for event in read_events(run.path / "events.jsonl")]
    for root in (data, None):
        for event in events:
            if event["event"] == "evaluated" and "data" in event and event["task"] in tasks:
                folders[tasks[event["task"]]].append((root or Path(event["data"])) / event["images"])
    return {task: list(dict.fromkeys(found)) for task, found in folders.items()}


def _endings(run: Run) -> list[str]:
    """How the names of cells may end: not at all with the checkpoint's own locator, else with another one's name."""
    return ["", *(f".{Path(name).stem}" for name in (run.locator, *LOCATORS) if name)]


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The predictions of one cell by question id; none without its summary, which is written last."""
    summary = path.with_suffix(".json")
    if not path.is_file() or not summary.is_file():
        return {}
    corpus = bool(read_json(summary).get("parts"))  # scored as a whole: a row's figure is neither right nor wrong
    rows = {}
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):  # splitlines cuts at Unicode's breaks too
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ClmoeError(f"{path}, row {number}: not JSON ({error})") from error
        for field, types in _FIELDS.items():
            if field not in row or not isinstance(row[field], types):
                raise ClmoeError(f"{path}, row {number}: field {field!r} is missing or has the wrong type")
        rows[row["question_id"]] = row | {"right": None if corpus else row["score"] >= RIGHT}
    return rows


def _clip(text: str) -> str:
    return text if len(text) <= LONGEST else text[:LONGEST] + " …"
