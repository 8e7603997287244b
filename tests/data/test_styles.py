"""Answer-style diversification: every style against hand-worked examples, and which records get which style."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from clmoe.data.records import TrainRecord, Turn
from clmoe.data.styles import STYLES, DiversifiedRecords, read_texts, style_of
from clmoe.errors import ClmoeError

SHORT, LETTER = f"\n{STYLES['short']}", f"\n{STYLES['choice']}"
COLOURS = ("red", "green", "blue", "grey", "pink", "black")
OPTIONS = "What colour is it?\nContext: N/A\nOptions: (A) red (B) green" + LETTER


def record(name: str, *turns: tuple[str, str]) -> TrainRecord:
    return TrainRecord(name, "a.png", tuple(Turn(*turn) for turn in turns))


def words(count: int) -> list[TrainRecord]:
    """Records that ask in turn for a number, 1 or 2, and for a colour, one of six."""
    rows = [
        ("What colour is it?", COLOURS[n // 2 % 6]) if n % 2 else ("How many?", "12"[n // 2 % 2]) for n in range(count)
    ]
    return [record(str(n), (question + SHORT, answer)) for n, (question, answer) in enumerate(rows)]


@pytest.mark.parametrize(
    ("turn", "style"),
    [
        (("Is it red?", "Yes."), "yes_no"), ((OPTIONS, "B"), "choice"), (("Which?\nA. red\nB. green", "(A)"), "choice"),
        (("Which grade?", "B"), "short"), (("Where?", "[0.10, 0.2, 0.30, 0.45]"), "short"),
        (("Describe it.", "A small red circle lies on snow."), "detailed"),
    ],
)  # fmt: skip
def test_the_style_of_an_answer(turn: tuple[str, str], style: str) -> None:
    assert style_of(Turn(*turn)) == style


@pytest.mark.parametrize(
    ("rows", "possible"),
    [
        # another answer to the same question is proposed as often as the right one
        ([(f"Which?{SHORT}", "cat"), (f"Which?{SHORT}", "dog")], {
            ("Which?\nIs the answer cat?\nPlease answer yes or no.", "yes"),
            ("Which?\nIs the answer dog?\nPlease answer yes or no.", "no"),
            (f"Which?\nA. cat\nB. dog{LETTER}", "A"), (f"Which?\nA. dog\nB. cat{LETTER}", "B"),
        }),
        # if the question has no other answer, one of the same kind is proposed, here a box
        ([("Where is x?", "[0.1, 0.2]"), ("Where is y?", "[0.3, 0.4]"), ("How many?", "3"), ("What?", "cat")], {
            ("Where is x?\nIs the answer [0.1, 0.2]?\nPlease answer yes or no.", "yes"),
            ("Where is x?\nIs the answer [0.3, 0.4]?\nPlease answer yes or no.", "no"),
            (f"Where is x?\nA. [0.1, 0.2]\nB. [0.3, 0.4]{LETTER}", "A"),
            (f"Where is x?\nA. [0.3, 0.4]\nB. [0.1, 0.2]{LETTER}", "B"),
        }),
        # with options, the text of an option is the short answer, and the wrong options are proposed
        ([(OPTIONS, "B"), (OPTIONS, "A")], {
            (f"What colour is it?\nContext: N/A{SHORT}", "green"),
            ("What colour is it?\nContext: N/A\nIs the answer green?\nPlease answer yes or no.", "yes"),
            ("What colour is it?\nContext: N/A\nIs the answer red?\nPlease answer yes or no.", "no"),
        }),
        ([("Is it red?", "no")], {
            (f"Is it red?\nA. yes\nB. no{LETTER}", "B"), (f"Is it red?\nA. no\nB. yes{LETTER}", "A"),
        }),
    ],
)  # fmt: skip
def test_rules_by_hand(rows: list[tuple[str, str]], possible: set[tuple[str, str]]) -> None:
    records = [record(str(number), row) for number, row in enumerate(rows)]
    made = [DiversifiedRecords(records, 1.0, seed)[0].turns[0] for seed in range(60)]
    assert {(turn.question, turn.answer) for turn in made} == possible


def test_a_choice_has_three_wrong_answers_of_its_own_question_and_names_the_right_one() -> None:
    records = words(48)
    for old, new in zip(records, DiversifiedRecords(records, 1.0, 3), strict=True):
        (was,), (turn,) = old.turns, new.turns
        asked, *lines = turn.question.splitlines()
        assert asked == was.question.splitlines()[0] and lines[-1] in STYLES.values()
        if lines[-1] == STYLES["choice"]:
            options = dict(line.split(". ") for line in lines[:-1])
            assert options[turn.answer] == was.answer
            known = COLOURS if asked == "What colour is it?" else ("1", "2")
            assert len(set(options.values())) == len(options) == min(4, len(known)) and {*options.values()} <= {*known}
        else:
            assert (turn.answer == "yes") == (lines[0] == f"Is the answer {was.answer}?")


def test_the_share_is_exact_even_over_the_styles_and_decided_by_the_seed() -> None:
    records = words(100)
    texts = {str(n): {"brief": f"why {n}", "detailed": f"why and how {n}"} for n in range(100)}
    made = DiversifiedRecords(records, 0.2, 0, texts)
    changed = [n for n in range(100) if made[n] != records[n]]
    assert len(changed) == 20 and len(made) == 100
    lines = Counter(made[n].turns[0].question.splitlines()[-1] for n in changed)
    assert lines == {STYLES[name]: 5 for name in ("yes_no", "choice", "brief", "detailed")}
    for n in changed:
        (turn,) = made[n].turns
        if turn.question.endswith(STYLES["brief"]):
            asked = records[n].turns[0].question.removesuffix(SHORT)
            assert turn == Turn(f"{asked}\n{STYLES['brief']}", f"why {n}")
    assert list(made) == list(DiversifiedRecords(records, 0.2, 0, texts))
    assert list(made) != list(DiversifiedRecords(records, 0.2, 1, texts))
    assert [made[n].id for n in range(100)] == [record.id for record in records]


def test_what_cannot_be_rewritten_or_would_not_fit_stays() -> None:
    lone = [record("only", ("What?", "cat")), record("long", ("Describe it.", "It is a cat that sits on a mat."))]
    assert list(DiversifiedRecords(lone, 1.0, 0)) == lone

    def fits(made: TrainRecord, root: Path) -> tuple[int, int]:
        return 0, 1

    records = words(20)
    assert list(DiversifiedRecords(records, 1.0, 0, fits=fits)) == records  # type: ignore[arg-type]


def test_turns_of_a_conversation_change_together() -> None:
    pair = [record(str(n), (f"Which?{SHORT}", "cat" if n else "dog"), (OPTIONS, "A")) for n in range(2)]
    for made in DiversifiedRecords(pair, 1.0, 0):
        assert len({turn.question.splitlines()[-1] for turn in made.turns}) == 1


@pytest.mark.parametrize("content", [[], {"7": "text"}, {"7": {"brief": ""}}, {"7": {"long": "text"}}])
def test_explanations_name_file_and_id(content: Any, tmp_path: Path) -> None:
    (tmp_path / "texts.json").write_text(json.dumps(content))
    with pytest.raises(ClmoeError, match=rf"texts\.json: id '{'7' if content else ''}'"):
        read_texts(tmp_path / "texts.json")
