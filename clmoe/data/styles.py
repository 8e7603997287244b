"""Answer-style diversification (SEFE's ASD): a share of a task's training records, asked and answered in other styles.

Chen et al., ICML 2025: X % of each task (20) is divided evenly among the styles that are not its own: yes or
no, multiple choice, short answer, brief and detailed explanation. A question's last line says which style is wanted.
Rules make the first three from a task's questions and answers alone. The paper has a large model write most wrong
choices and all explanations; here wrong choices are other answers of the task, and explanations come from a file.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import Random

from clmoe.data.records import Fits, LookedUpRecords, TrainRecord, Turn
from clmoe.data.rows import read_json_strictly, shown
from clmoe.errors import ClmoeError

STYLES = {
    "yes_no": "Please answer yes or no.",
    "choice": "Answer with the option's letter from the given choices directly.",
    "short": "Answer the question using a single word or phrase.",
    "brief": "Please explain the answer briefly.",
    "detailed": "Please explain the answer in detail.",
}
"""Each style and the line that asks for it. Those for choices and short answers are CoIN's, the others ours."""
EXPLAINED = ("brief", "detailed")
WRONG_CHOICES = 3

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_OPTION = re.compile(r"(?:^|\s)\(?([A-Z])[).:]\s*(.+?)(?=\s+\(?[A-Z][).:]\s|\s*$)", re.MULTILINE)
_INSTRUCTION = re.compile(r"\n[^\n]*\b(?:[Aa]nswer|explain)\b[^\n]*$")
_NUMBERS = re.compile(r"[\d\s.,%\[\]()-]+")

Texts = Mapping[str, Mapping[str, str]]  # record's id -> style -> explanation


class DiversifiedRecords(LookedUpRecords):
    """The records of a task, ``share`` of them rewritten; the seed and their ids decide which ones, and how."""

    def __init__(
        self,
        records: Sequence[TrainRecord],
        share: float,
        seed: int,
        texts: Texts | None = None,
        fits: Fits | None = None,
        image_root: Path = Path(),
    ) -> None:
        """Args:
        share: X / 100.
        texts: explanations, as ``read_texts``; a record without them gets no explaining style.
        fits: a record stays as it was if rewriting it leaves no answer token.
        """
        self.records, self.seed, self.texts, self.fits, self.root = records, seed, texts or {}, fits, image_root
        able = [n for n, record in enumerate(records) if self._able(record)]
        chosen = Random(f"{seed}/asd").sample(able, min(round(share * len(records)), len(able)))
        self.place = {position: place for place, position in enumerate(chosen)}

    def __len__(self) -> int:
        return len(self.records)

    def record(self, position: int) -> TrainRecord:
        record = self.records[position]
        return record if position not in self.place else self._rewritten(record, self.place[position])

    def _able(self, record: TrainRecord) -> list[str]:
        """The styles that all turns of the record can have besides their own."""
        if record.masked:
            return []
        explained = self.texts.get(record.id, {}) if len(record.turns) == 1 else {}
        able = [self._styles(turn) | explained.keys() - {style_of(turn)} for turn in record.turns]
        return [style for style in STYLES if all(style in styles for styles in able)]

    def _styles(self, turn: Turn) -> set[str]:
        own, right = style_of(turn), _answer(turn)
        if right is None:
            return set()
        wrong = self._pool(turn, right)
        able = {"yes_no", "choice"} if len(wrong) > 1 or wrong[:1] not in ([], [right]) else set()
        return (able | ({"short"} if own == "choice" else set())) - {own}

    @cached_property
    def _answers(self) -> dict[str, list[str]]:
        """The task's different short answers by question, and by kind of answer over all questions."""
        found: dict[str, dict[str, str]] = {}
        for record in self.records:
            for turn in record.turns if not record.masked else ():
                if (short := _answer(turn)) is not None and style_of(turn) == "short":
                    for pool in (_asked(turn.question), _kind(short)):
                        found.setdefault(pool, {}).setdefault(short.lower(), short)
        return {pool: list(answers.values()) for pool, answers in found.items()}

    def _pool(self, turn: Turn, right: str) -> list[str]:
        """Answers to choose from: the question's options, else others to the same question, else of the same kind."""
        if style_of(turn) != "short":
            return list(options_of(turn.question).values()) or ["yes", "no"]
        same = self._answers.get(_asked(turn.question), [])
        return same if len(same) > 1 else self._answers.get(_kind(right), [])

    def _rewritten(self, record: TrainRecord, place: int) -> TrainRecord:
        styles, rng = self._able(record), Random(f"{self.seed}/asd/{record.id}")
        style = styles[place % len(styles)]
        made = replace(record, turns=tuple(self._turn(record.id, turn, style, rng) for turn in record.turns))
        return made if self.fits is None or self.fits(made, self.root)[0] else record

    def _turn(self, name: str, turn: Turn, style: str, rng: Random) -> Turn:
        question, right = _asked(turn.question), _answer(turn)
        if style in EXPLAINED:
            asked = turn.question.replace(_instruction(turn.question), "")
            return Turn(f"{asked}\n{STYLES[style]}", self.texts[name][style])
        assert right is not None
        if style == "short":
            return Turn(f"{question}\n{STYLES[style]}", right)
        pool = self._pool(turn, right)
        drawn = rng.sample(pool, min(WRONG_CHOICES + 1, len(pool)))
        wrong = [answer for answer in drawn if answer.lower() != right.lower()][:WRONG_CHOICES]
        if style == "yes_no":
            proposed, answer = (right, "yes") if rng.random() < 0.5 else (wrong[0], "no")
            return Turn(f"{question}\nIs the answer {proposed}?\n{STYLES[style]}", answer)
        choices = [right, *wrong]
        rng.shuffle(choices)
        lines = [f"{letter}. {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)]
        return Turn("\n".join([question, *lines, STYLES[style]]), _LETTERS[choices.index(right)])


def diversified(
    records: Sequence[TrainRecord], share: float, seed: int, texts: str, fits: Fits, image_root: Path
) -> Sequence[TrainRecord]:
    """The records under ``training.asd`` and ``training.asd_texts``. Raises ClmoeError as ``read_texts`` does."""
    if not share:
        return records
    explained = read_texts(Path(texts)) if texts else None
    return DiversifiedRecords(records, share, seed, explained, fits, image_root)


def style_of(turn: Turn) -> str:
    """The style of a question and its answer, one of ``STYLES``; every long answer counts as detailed."""
    answer = turn.answer.strip().rstrip(".")
    if answer.lower() in ("yes", "no"):
        return "yes_no"
    if answer.strip("()") in options_of(turn.question):
        return "choice"
    return "short" if len(answer.split()) <= 5 or _NUMBERS.fullmatch(answer) else "detailed"


def options_of(question: str) -> dict[str, str]:
    """The options that a question lists, by letter: ``A. red`` line by line, or ``(A) red (B) blue``."""
    found = dict(_OPTION.findall(question.replace(_instruction(question), "")))
    return found if len(found) > 1 and list(found) == list(_LETTERS[: len(found)]) else {}


def read_texts(path: Path) -> Texts:
    """Explanations by record id: ``{"17": {"brief": "...", "detailed": "..."}}``. ClmoeError names file and id."""
    found = read_json_strictly(path)
    for name, texts in found.items() if isinstance(found, dict) else [("", found)]:
        good = isinstance(texts, dict) and texts.keys() <= {*EXPLAINED}
        if not good or not all(isinstance(text, str) and text.strip() for text in texts.values()):
            wanted = "an object with texts 'brief' or 'detailed'"
            raise ClmoeError(f"{path}: id {name!r}: expected {wanted}, found {shown(texts)}")
    return dict(found)


def _answer(turn: Turn) -> str | None:
    """The answer as a word or phrase; None if it explains."""
    style = style_of(turn)
    if style == "choice":
        return options_of(turn.question)[turn.answer.strip().rstrip(".").strip("()")]
    return None if style in EXPLAINED else turn.answer.strip()


def _kind(answer: str) -> str:
    """The name of the pool of answers that look like this one: a number, a box, or words."""
    return re.sub(r"\d+", "0", answer) if _NUMBERS.fullmatch(answer) else "words"


def _instruction(question: str) -> str:
    match = _INSTRUCTION.search(question)
    return match[0] if match else ""


def _asked(question: str) -> str:
    """The question without its options and without the line that asks for a style."""
    kept = question.replace(_instruction(question), "")
    if options_of(question):
        kept = _OPTION.split(kept, maxsplit=1)[0]
        kept = re.sub(r"\s*(?:Options|Choices):\s*$", "", kept)
    return kept.strip()
