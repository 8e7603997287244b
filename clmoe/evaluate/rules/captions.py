"""Captions (UCIT's VizWiz and Flickr30k): BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, computed by pycocoevalcap.

Its tokenizer and METEOR are Java programs. Without the package or Java nothing is scored: the mean of fewer figures
would be another metric under the same name.
"""

import shutil
from collections.abc import Sequence
from importlib.util import find_spec

from clmoe.data.records import Question
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.base import CorpusScore, unfit

_WITHOUT = "; a sequence without caption tasks (ORDER=...) needs neither"


def captions(predictions: Sequence[str], questions: Sequence[Question]) -> CorpusScore:
    """UCIT's score: the mean of seven figures over the whole list, BLEU-1, -2, -3, -4, METEOR, ROUGE-L and CIDEr.

    CIDEr goes up to 10, so the mean may exceed 1. ``rows`` holds the mean of each caption's own seven figures. An empty
    prediction counts as a caption without words. Reference captions are in ``question.extra["captions"]``.
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
    """Raise ClmoeError, saying what to install, if captions cannot be scored here."""
    if find_spec("pycocoevalcap") is None:
        raise ClmoeError(f"scorer 'captions' needs the package pycocoevalcap: pip install 'clmoe[captions]'{_WITHOUT}")
    if shutil.which("java") is None:
        install = "apt-get install default-jre-headless, or conda install openjdk"
        raise ClmoeError(f"scorer 'captions' needs Java 8 or newer, with `java` on the PATH ({install}){_WITHOUT}")


def references(question: Question) -> list[str]:
    """The question's reference captions; ClmoeError names a question without any."""
    texts = question.extra.get("captions")
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise unfit(question, "captions", "a list of reference captions; the task's 'gold' file may hold them")
    return texts


def _tokenized(texts: list[list[str]]) -> list[list[str]]:
    """Every text through the package's tokenizer, which reads lines and loses some without words.

    METEOR reads fields between bars, so texts must not hold these either.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    clean = {(i, k): " ".join(t.replace("|||", " ").split()) for i, row in enumerate(texts) for k, t in enumerate(row)}
    full = {key: [{"caption": text}] for key, text in clean.items() if text}
    tokens = PTBTokenizer().tokenize(full) if full else {}
    lost = [key for key in full if len(tokens.get(key, [])) != 1]
    if lost:
        raise ClmoeError(f"captions: the tokenizer returned no line for {clean[lost[0]]!r}; check that Java runs")
    return [[tokens[i, k][0] if clean[i, k] else "" for k in range(len(row))] for i, row in enumerate(texts)]
