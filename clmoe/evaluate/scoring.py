"""The scoring rules by name, and the score of a task's answers.

pycocoevalcap scores UCIT's captions; its tokenizer and METEOR are Java programs. Without the package or Java nothing is
scored: the mean of fewer figures would be another metric under the same name.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, cast

from clmoe.data.records import Question
from clmoe.data.rows import short
from clmoe.errors import ClmoeError
from clmoe.evaluate import rules
from clmoe.evaluate.rules import MODES, Mode, Scorer, unfit
from clmoe.utils.names import unknown

SCORERS: dict[str, Scorer] = {
    "short_answer": rules.short_answer,
    "option_letter": rules.option_letter,
    "iou": rules.iou,
    "vqa": rules.vqa,
    "textvqa": rules.textvqa,
    "class_name": rules.class_name,
    "gqa": rules.gqa,
    "ocr_vqa": rules.ocr_vqa,
    "contains_words": rules.contains_words,
    "contains_answer": rules.contains_answer,
    "science": rules.science,
    "stock": rules.stock,
    "pope": rules.pope,
    "mme": rules.mme,
}
CAPTIONS = "captions"
"""The one rule that needs all answers of a task at once."""


@dataclass(frozen=True)
class CorpusScore:
    """The score of a list of answers (not always the mean of its rows), of each answer, and the figures beside it."""

    score: float
    rows: list[float]
    parts: Mapping[str, float]


def check_scorer(name: str, mode: Mode = "fixed") -> None:
    """Raise ClmoeError if there is no such scorer or mode, or if the scorer needs something that is not installed."""
    _check_name(name)
    if mode not in MODES:
        raise ClmoeError(unknown("scoring mode", mode, MODES))
    if name == CAPTIONS:
        require_captions()


def gold_problem(scorer: str, question: Question) -> str | None:
    """Why no answer to the question, not even its gold answer, can be right under this rule; None if one can."""
    several = question.extra.get("answers")
    golden = [question.answer, *(several if isinstance(several, list) else []), question.extra.get("answer_bbox")]
    _check_name(scorer)
    try:
        if scorer == CAPTIONS:
            references(question)
            return None
        if any(SCORERS[scorer](str(answer), question, "fixed") > 0 for answer in golden):
            return None
    except ClmoeError as error:
        return str(error)
    shown = short(repr(shown_answer(question)))
    return f"question {question.question_id}: scorer {scorer!r} would accept no answer for {shown}, not even itself"


def check_gold(scorer: str, questions: Sequence[Question], mode: Mode = "fixed") -> None:
    """Raise ClmoeError, naming the question, unless all can be scored; some published ones have no right answer."""
    check_scorer(scorer, mode)
    for question in questions:
        if scorer == CAPTIONS:
            references(question)
        else:
            SCORERS[scorer]("?", question, mode)  # not "", for which a rule may not read the gold answer


def score_answers(
    scorer: str, predictions: Sequence[str], questions: Sequence[Question], mode: Mode = "fixed"
) -> CorpusScore:
    """Score a task's answers, one per question. Raises ClmoeError for no questions and as ``check_gold`` does."""
    check_scorer(scorer, mode)
    if not questions:
        raise ClmoeError("there are no questions to score; check the task's test file")
    if scorer == CAPTIONS:
        return captions(predictions, questions, mode)
    rows = [SCORERS[scorer](text, question, mode) for text, question in zip(predictions, questions, strict=True)]
    return _TOTALS[scorer](rows, questions) if scorer in _TOTALS else CorpusScore(sum(rows) / len(rows), rows, {})


def shown_answer(question: Question) -> str:
    """The expected answer for people to read: the answer, the accepted ones, the captions, or the box."""
    several = question.extra.get("answers") or question.extra.get("captions") or []
    return question.answer or " | ".join(dict.fromkeys(map(str, several))) or str(question.extra.get("answer_bbox", ""))


def _check_name(scorer: str) -> None:
    if scorer not in (*SCORERS, CAPTIONS):
        raise ClmoeError(unknown("scorer", scorer, (*SCORERS, CAPTIONS)))


# ---- POPE and MME


def _pope(rows: list[float], questions: Sequence[Question]) -> CorpusScore:
    """Accuracy; parts in percent: precision, recall and F1 of "yes", and its share among the answers (Li et al., 2023).

    A wrong answer to a question whose answer is no counts as yes.
    """
    asked = [question.answer.strip().lower().startswith("yes") for question in questions]
    right = sum(row for row, yes in zip(rows, asked, strict=True) if yes)
    wrong = sum(1 - row for row, yes in zip(rows, asked, strict=True) if not yes)
    said, expected = right + wrong, sum(asked)
    parts = {
        "precision": right / said if said else 0.0,
        "recall": right / expected if expected else 0.0,
        "F1": 2 * right / (said + expected) if said + expected else 0.0,
        "yes": said / len(rows),
    }
    return CorpusScore(sum(rows) / len(rows), rows, {name: 100 * value for name, value in parts.items()})


_COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _mme(rows: list[float], questions: Sequence[Question]) -> CorpusScore:
    """MME (Fu et al., 2023): a subtask's score is its accuracy plus the share of images with all answers right, at most
    200; parts: subtask scores, and the sums ``perception`` and ``cognition``. The score is their mean, out of 100.
    """
    answers: dict[str, dict[str | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row, question in zip(rows, questions, strict=True):
        answers[question.extra["category"]][question.image].append(row)
    parts = {}
    for category, images in sorted(answers.items()):
        asked = [row for own in images.values() for row in own]
        parts[category] = 100 * (sum(asked) / len(asked) + sum(map(min, images.values())) / len(images))
    score = sum(parts.values()) / len(parts) / 200
    cognition = sum(value for name, value in parts.items() if name in _COGNITION)
    return CorpusScore(score, rows, parts | {"perception": sum(parts.values()) - cognition, "cognition": cognition})


_TOTALS: dict[str, Callable[[list[float], Sequence[Question]], CorpusScore]] = {"pope": _pope, "mme": _mme}

# ---- Captions

_WITHOUT = "; a sequence without caption tasks (ORDER=...) needs neither"


def captions(predictions: Sequence[str], questions: Sequence[Question], mode: Mode) -> CorpusScore:
    """UCIT's score: the mean of seven figures over the whole list, BLEU-1, -2, -3, -4, METEOR, ROUGE-L and CIDEr.

    CIDEr goes up to 10, so the mean may exceed 1. ``rows`` holds the mean of each caption's own seven figures. With
    ``official``, a caption with a line break in it shifts all later ones.
    """
    require_captions()
    from pycocoevalcap.eval import Bleu, Cider, Meteor, Rouge

    count = len(predictions)
    texts = [[p] for p in predictions], [references(question) for question in questions]
    if mode == "official":
        said, wanted = map(_tokenized_as_published, texts)
    else:
        tokens = _tokenized(texts[0] + texts[1])
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


def _tokenized_as_published(texts: list[list[str]]) -> dict[int, list[str]]:
    """As in UCIT's script, all texts are lines of one file. ClmoeError if lines get lost, where the script stops."""
    tokens = _tokens_of({i: [{"caption": text} for text in row] for i, row in enumerate(texts)})
    if len(tokens) != len(texts):
        raise ClmoeError(f"captions: the tokenizer returned {len(tokens)} of {len(texts)} lines; check that Java runs")
    return tokens


def _tokenized(texts: list[list[str]]) -> list[list[str]]:
    """Through the package's tokenizer, which reads lines and loses some without words; METEOR's fields end at bars."""
    clean = {(i, k): " ".join(t.replace("|||", " ").split()) for i, row in enumerate(texts) for k, t in enumerate(row)}
    full = {key: [{"caption": text}] for key, text in clean.items() if text}
    tokens = _tokens_of(full) if full else {}
    lost = [key for key in full if len(tokens.get(key, [])) != 1]
    if lost:
        raise ClmoeError(f"captions: the tokenizer returned no line for {clean[lost[0]]!r}; check that Java runs")
    return [[tokens[i, k][0] if clean[i, k] else "" for k in range(len(row))] for i, row in enumerate(texts)]


def _tokens_of(texts: dict[Any, list[dict[str, str]]]) -> dict[Any, list[str]]:
    """The package's Penn Treebank tokenizer, which runs in Java."""
    from pycocoevalcap.eval import PTBTokenizer

    return cast(dict[Any, list[str]], PTBTokenizer().tokenize(texts))
