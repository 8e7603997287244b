"""Captions: the seven figures against their definitions on captions small enough to count by hand."""

import math
import shutil
from importlib.util import find_spec

import pytest

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate import scoring as rules
from clmoe.evaluate.scoring import score_answers

needs_captions = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None or shutil.which("java") is None,
    reason="needs pycocoevalcap (pip install 'clmoe[captions]') and Java: caption scores are NOT proven here",
)
REFERENCES = (["A red mug on a desk.", "Mug on table."], ["Two dogs run over green grass."], ["A man rides a horse."])
QUESTIONS = [Question(str(n), None, "Describe it.", "", {"captions": list(r)}) for n, r in enumerate(REFERENCES, 1)]
RIGHT = ["a red mug on a desk", "two dogs run over green grass", "a man rides a horse"]


@needs_captions
def test_perfect_captions_reach_every_figures_maximum() -> None:
    result = score_answers("captions", RIGHT, QUESTIONS)
    assert list(result.parts) == ["BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L", "CIDEr"]
    for name in ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "ROUGE-L"):
        assert result.parts[name] == pytest.approx(1, abs=1e-6), name
    # CIDEr is ten times the mean cosine: 10 for the captions with one reference, less for the one with two
    assert 20 / 3 < result.parts["CIDEr"] < 10
    assert result.score == pytest.approx(sum(result.parts.values()) / 7)
    assert len(result.rows) == 3


@needs_captions
def test_figures_by_hand() -> None:
    """Unigrams by counting: "a red cup" has 2 of 3 words, shorter than its nearest reference of 3 words by none."""
    result = score_answers("captions", ["a red cup", RIGHT[1], RIGHT[2]], QUESTIONS)
    matched, said, wanted = 2 + 6 + 5, 3 + 6 + 5, 3 + 6 + 5  # "Mug on table" is the nearest in length
    assert result.parts["BLEU-1"] == pytest.approx(matched / said * math.exp(min(0, 1 - wanted / said)), rel=1e-6)
    # longest common subsequence "a red": 2 of 3 said, 2 of 6 wanted, F with beta 1.2
    p, r, beta = 2 / 3, 2 / 6, 1.2**2
    assert result.parts["ROUGE-L"] == pytest.approx(((1 + beta) * p * r / (r + beta * p) + 1 + 1) / 3, rel=1e-6)
    assert result.rows[0] < result.rows[1]


@needs_captions
def test_line_breaks_bars_and_silence_shift_no_other_caption() -> None:
    """The tokenizer and METEOR read lines and fields between bars."""
    odd = ["x\n", "\n y", "x\u2028y", "x ||| y", "x\r\ny", "", " ", "A mug, red.", ""]
    tokens = rules._tokenized([[text] for text in odd])
    assert tokens == [[text] for text in ("x", "y", "x y", "x y", "x y", "", "", "a mug red", "")]


def test_missing_references_are_an_error() -> None:
    with pytest.raises(ClmoeError, match="question 7: field 'captions'"):
        rules.references(Question("7", None, "?", "x", {}))


@pytest.mark.parametrize(("missing", "message"), [("java", "apt-get install"), ("package", r"clmoe\[captions\]")])
def test_what_to_install_is_said_and_nothing_scored(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "find_spec", lambda name: None if missing == "package" else object())
    monkeypatch.setattr(rules.shutil, "which", lambda name: None if missing == "java" else "/usr/bin/java")
    with pytest.raises(ClmoeError, match=message):
        score_answers("captions", RIGHT, QUESTIONS)
