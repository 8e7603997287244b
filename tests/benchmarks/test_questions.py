"""Which questions a limit asks."""

from clmoe.benchmarks.base import sampled
from clmoe.data.records import Question


def sorted_file(count: int) -> list[Question]:
    """Questions ordered by kind: the first half is of one, the second of another."""
    return [Question(f"{row:04}", None, "easy" if row < count / 2 else "hard", "x", {}) for row in range(count)]


def test_a_sample_stands_for_a_file_that_is_ordered_by_kind() -> None:
    questions = sorted_file(1000)
    few, more = sampled(questions, 100), sampled(questions, 200)
    assert (len(few), len(more)) == (100, 200)
    # a frozen model that knows the easy half must not seem to forget it: 4 standard errors of 5 points around a half
    assert 30 < sum(question.text == "easy" for question in few) < 70
    assert {question.question_id for question in few} < {question.question_id for question in more}
    assert [question.question_id for question in few] == sorted(question.question_id for question in few)
    assert sampled(questions, 100) == few


def test_a_sample_depends_on_the_number_of_questions_alone() -> None:
    rows = [int(question.question_id) for question in sampled(sorted_file(50), 7)]
    others = [Question(f"other {row}", "a.jpg", "text", "y", {}) for row in range(50)]
    assert sampled(others, 7) == [others[row] for row in rows]
    assert sampled(others, None) == sampled(others, 50) == sampled(others, 60) == others
