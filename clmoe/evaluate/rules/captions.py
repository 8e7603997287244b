"""Captions (UCIT's VizWiz and Flickr30k): BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, by the package pycocoevalcap.

The package's tokenizer and METEOR are Java programs. Where the package or Java is missing nothing is scored: the mean
of fewer figures would be another metric under the same name.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import CorpusScore

if TYPE_CHECKING:
    from clmoe.data.records import Question

_WITHOUT = "; a sequence without such tasks (ORDER=...) needs neither"


def captions(predictions: Sequence[str], questions: Sequence[Question]) -> CorpusScore:
    """The mean of seven figures over the whole list: BLEU-1, -2, -3, -4, METEOR, ROUGE-L, CIDEr (UCIT's score).

    CIDEr goes up to 10, so the mean may exceed 1. ``rows`` are the means of the seven figures of each caption alone.
    An empty prediction counts as a caption without words.

    Args:
        questions: with reference captions in ``extra["captions"]``.

    Raises:
        ClmoeError: the package or Java is missing, or a question has no reference captions.
    """
    require_captions()
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge

    count = len(predictions)
    tokens = _tokenized([[p] for p in predictions] + [references(question) for question in questions])
    said, wanted = dict(enumerate(tokens[:count])), dict(enumerate(tokens[count:]))
    bleu, bleu_rows = Bleu(4).compute_score(wanted, said, verbose=0)
    figures = {f"BLEU-{n}": (score, rows) for n, (score, rows) in enumerate(zip(bleu, bleu_rows, strict=True), 1)}
    for name, scorer in (("METEOR", Meteor()), ("ROUGE-L", Rouge()), ("CIDEr", Cider())):
        figures[name] = scorer.compute_score(wanted, said)
    parts = {name: float(score) for name, (score, _) in figures.items()}
    by_row = zip(*(rows for _, rows in figures.values()), strict=True)
    return CorpusScore(sum(parts.values()) / len(parts), [sum(map(float, row)) / len(parts) for row in by_row], parts)


def require_captions() -> None:
    """Raises ClmoeError, saying what to install, where captions cannot be scored."""
    if find_spec("pycocoevalcap") is None:
        raise ClmoeError(f"scorer 'captions' needs the package pycocoevalcap: pip install 'clmoe[captions]'{_WITHOUT}")
    if shutil.which("java") is None:
        raise ClmoeError(
            "scorer 'captions' needs Java 8 or newer for the tokenizer and METEOR (apt-get install "
            f"default-jre-headless, or conda install openjdk), with `java` on the PATH{_WITHOUT}"
        )


def references(question: Question) -> list[str]:
    """The question's reference captions; ClmoeError names the question that has none."""
    texts = question.extra.get("captions")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ClmoeError(
            f"question {question.question_id}: no reference captions in field 'captions', which scorer 'captions' "
            "needs; name the task's 'gold' file or mend the test file"
        )
    return texts


def _tokenized(texts: list[list[str]]) -> list[list[str]]:
    """What the package's tokenizer makes of each text.

    The tokenizer works on lines and METEOR on fields between bars, so neither may be in a text; lines without words
    do not reach the tokenizer, which loses some of them.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    clean = {(i, k): " ".join(t.replace("|||", " ").split()) for i, row in enumerate(texts) for k, t in enumerate(row)}
    full = {key: [{"caption": text}] for key, text in clean.items() if text}
    tokens = PTBTokenizer().tokenize(full) if full else {}
    lost = [key for key in full if len(tokens.get(key, [])) != 1]
    if lost:
        raise ClmoeError(f"captions: the tokenizer returned no line for {clean[lost[0]]!r}; check that Java runs")
    return [[tokens[i, k][0] if clean[i, k] else "" for k in range(len(row))] for i, row in enumerate(texts)]
