"""The real benchmarks on miniature trees in their own formats: gold files, checks, builders, and an evaluation."""

import json
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark, task_questions
from clmoe.benchmarks.prepare import padded_box
from clmoe.data.records import load_train
from clmoe.errors import ClmoeError
from clmoe.evaluate.scoring import gold_problem, score_answers
from tests.support import load_script
from tests.trees import ROWS, TREES, draw, write

CAN_CAPTION = find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
ORDERS = {
    "coin": "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA",
    "cl4vqa": "recognition location judge commonsense count action color type subcategory causal",
    "ucit": "ImageNet-R ArxivQA VizWiz-caption IconQA CLEVR-Math Flickr30k",
    "mllm_dcl": "RS Med AD Sci Fin",
}


class Commands:
    """Runs ``clmoe`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def run(self, *arguments: object) -> str:
        cli.main([str(argument) for argument in arguments])
        return self.capsys.readouterr().out

    def refused(self, *arguments: object) -> str:
        with pytest.raises(SystemExit, match="2"):
            cli.main([str(argument) for argument in arguments])
        return self.capsys.readouterr().err

    def bad(self, name: str, tree: Path) -> list[str]:
        """The lines that ``clmoe data check`` lists as bad."""
        error = self.refused("data", "check", name, "--data", tree, "--bad", tree / "bad.txt")
        bad = (tree / "bad.txt").read_text().splitlines()
        assert f"clmoe data: {len(bad)} bad" in error
        return bad


@pytest.fixture
def clmoe(capsys: pytest.CaptureFixture[str]) -> Commands:
    return Commands(capsys)


@pytest.fixture(params=TREES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tree(name: str, tmp_path: Path) -> Path:
    return TREES[name](tmp_path / name)


@pytest.fixture
def coin(tmp_path: Path) -> Path:
    return TREES["coin"](tmp_path)


def edit(path: Path, *changes: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    for change in changes:
        change(data)
    path.write_text(json.dumps(data))


# ---- gold files ----


def test_order_files_gold_answers_and_full_marks(name: str, tree: Path, clmoe: Commands) -> None:
    benchmark, checked = load_benchmark(name, tree), clmoe.run("data", "check", name, "--data", tree)
    assert benchmark.name == name and ("without ten annotators" in checked) == (name in ("coin", "cl4vqa"))
    assert [task.name for task in benchmark.tasks] == ORDERS[name].split()
    for task in benchmark.tasks:
        assert f"{task.name:<16}{ROWS:>7} train {ROWS:>7} test {0:>7} bad" in checked
        assert len(load_train(task.train, task.image_root)) == ROWS
        questions = task_questions(task)
        assert [gold_problem(task.scorer, question) for question in questions] == [None] * ROWS
        assert all(question.text.endswith(task.suffix) for question in questions)
        if task.scorer != "captions":
            said = [q.answer or (q.extra.get("answers") or [q.extra.get("answer_bbox")])[0] for q in questions]
            assert score_answers(task.scorer, said, questions).score == pytest.approx(1.0), task.name
            assert score_answers(task.scorer, [""] * ROWS, questions).score == 0.0


def test_no_question_depends_on_its_answer(tmp_path: Path) -> None:
    """The text of a question must not depend on its answer.

    MLLM-DCL's published script chooses the suffix of Fin's questions by the expected answer; all of Med's get the same.
    """
    benchmark = load_benchmark("mllm_dcl", TREES["mllm_dcl"](tmp_path))
    texts = {task.name: {question.text for question in task_questions(task)} for task in benchmark.tasks}
    assert all(len(of_task) == 1 for of_task in texts.values())
    assert texts["Med"].pop().endswith("? Answer the question with a single word (or phrase).")
    assert not texts["Fin"].pop().endswith((".", "C, D."))
    assert [(task.passes, task.max_new_tokens) for task in benchmark.tasks] == [(n, 128) for n in (1, 3, 1, 2, 1)]


GOLD_FAULTS: dict[str, list[tuple[Callable[[Any], Any], str]]] = {
    "TextVQA/TextVQA_0.5.1_val.json": [(lambda d: d["data"].pop(2), "'2'"), (lambda d: d["data"].pop(4), "'5'")],
    "GQA/testdev_balanced_questions.json": [
        (lambda d: d.pop("4"), "'4'"),
        (lambda d: d["5"].update(answer=""), "'5'.*'answer'"),
        (lambda d: d["6"].update(isBalanced=False), "'6'.*isBalanced"),
    ],
    "ScienceQA/problems.json": [(lambda d: d.pop("3"), "'3'"), (lambda d: d["5"].update(answer=2), "'5'.*answer 2")],
    "ScienceQA/pid_splits.json": [(lambda d: d["test"].append("99"), "1 of the 9 .*'99'")],
}


@pytest.mark.parametrize("file", GOLD_FAULTS)
def test_faults_of_gold_files_name_file_and_id(file: str, coin: Path, clmoe: Commands) -> None:
    edit(coin / file, *(change for change, _ in GOLD_FAULTS[file]))
    with pytest.raises(ClmoeError, match=f"{file}: .*{GOLD_FAULTS[file][0][1]}"):
        task_questions(load_benchmark("coin", coin).task(file.split("/")[0]))
    bad = clmoe.bad("coin", coin)  # the check goes on after each fault
    assert len(bad) == len(GOLD_FAULTS[file])
    for line, (_, named) in zip(bad, GOLD_FAULTS[file], strict=True):
        assert re.search(f"{file}: .*{named}", line), line


def test_captions_belong_to_the_nth_question_or_to_its_id(tmp_path: Path) -> None:
    tree = TREES["ucit"](tmp_path)
    task = load_benchmark("ucit", tree).task("Flickr30k")
    by_number = task_questions(task)  # question ids 0..7, image ids 1..8
    assert [q.extra["captions"][0].split()[1] for q in by_number[:3]] == ["red", "green", "blue"]
    edit(task.test, lambda rows: [row.update(question_id=9 - n) for n, row in enumerate(rows, 1)])
    by_id = task_questions(task)  # question ids 8..1
    assert by_id[-1].extra["captions"] == by_number[0].extra["captions"]
    file = tree / "Flickr30k-cap/val_coco_type_3000.json"
    edit(file, lambda data: data["images"][2].update(file_name="other.jpg"))
    with pytest.raises(ClmoeError, match=rf"{file}: image '3'.*'other\.jpg'.*question_id '3'"):
        task_questions(task)
    edit(file, lambda data: data["images"].pop())
    with pytest.raises(ClmoeError, match=f"{file}: 7 images for 8 questions"):
        task_questions(task)


# ---- clmoe data check ----


def test_check_lists_everything_that_is_bad(tmp_path: Path, clmoe: Commands) -> None:
    tree = TREES["mllm_dcl"](tmp_path)
    (tree / "RS/images/0.png").write_bytes(b"no image")
    (tree / "AD/images/3.png").unlink()
    edit(tree / "Med/train.json", lambda rows: rows[2].update(id=1.5))
    edit(tree / "Med/test.json", lambda rows: rows[4].update(question_id="3"))  # an int 3 is there already
    edit(tree / "Fin/test.json", lambda rows: rows[5].update(answer=" ."))
    (tree / "Sci/train.json").write_text('[{"id": ')
    bad = clmoe.bad("mllm_dcl", tree)
    expected = [
        r"Med/train\.json: row 2 .*'id'", r"Med/test\.json: row 4 .*'question_id'.* row 3",
        r"AD/train\.json: row 3 .*'t3'.*'image'", r"AD/test\.json: row 3 .*'image'",
        r"Sci/train\.json: line 1, column", r"Fin/test\.json: question 5: .*' \.'", r"RS/images/0\.png: ",
    ]  # fmt: skip
    assert len(bad) == len(expected)
    for line, named in zip(bad, expected, strict=True):
        assert re.search(named, line), line


def test_check_invents_no_further_faults(coin: Path, clmoe: Commands) -> None:
    path = coin / "Instructions/ScienceQA/test.json"
    for spoil in (lambda: edit(path, lambda rows: rows[2].pop("text")), path.unlink):
        spoil()
        (bad,) = clmoe.bad("coin", coin)
        assert str(path) in bad


def test_missing_files_are_named_with_their_sources(name: str, tree: Path, clmoe: Commands) -> None:
    train = load_benchmark(name, tree).tasks[-1].train
    train.unlink()
    for command in ("check", "prepare"):
        error = clmoe.refused("data", command, name, "--data", tree)
        assert re.search(f"{train}.*https://", error) or "clmoe data prepare" in error
    with pytest.raises(ClmoeError, match=f"{train}, from "):
        load_benchmark(name, tree)


# ---- clmoe data prepare ----


def test_boxes_of_the_padded_square() -> None:
    assert padded_box([0, 0, 640, 480], 640, 480) == "[0.00, 0.12, 1.00, 0.88]", "80 of 640 above and below"
    assert padded_box([10, 20, 30, 40], 100, 200) == "[0.30, 0.10, 0.45, 0.30]", "50 of 200 on the left"
    assert padded_box([-1, 0, 30, 30], 20, 20) == "[0.00, 0.00, 1.00, 1.00]", "annotations may reach over the edge"


def half_a_task_is_left_alone(benchmark: str, name: str, tree: Path, clmoe: Commands) -> None:
    """A missing half is not built beside an existing one, because the task would mix two selections of the data."""
    task = load_benchmark(benchmark, tree).task(name)
    for there, lacking in ((task.train, task.test), (task.test, task.train)):
        kept, taken = there.read_bytes(), lacking.read_bytes()
        lacking.unlink()
        error = clmoe.refused("data", "prepare", benchmark, "--data", tree)
        assert re.search(f"{name}: .*{there} .*{lacking.name}", error)
        assert not lacking.exists() and there.read_bytes() == kept
        lacking.write_bytes(taken)


def test_grounding_is_built_from_refcoco(coin: Path, clmoe: Commands) -> None:
    shutil.rmtree(coin / "Instructions/Grounding")
    prepare = ("data", "prepare", "coin", "--data", coin)
    assert re.search("RefCOCO.*lichengunc/refer", clmoe.refused(*prepare))
    folder = coin / "RefCOCO/refcoco"
    image = {"id": 5, "file_name": "0.png", "width": 640, "height": 480}
    boxes = [{"id": 1, "bbox": [64, 48, 128, 96]}, {"id": 2, "bbox": [64, 48, 2, 96]}]  # 2 of 640 wide: 0.10 to 0.10
    write(folder / "instances.json", {"images": [image], "annotations": boxes})

    def references(*parts: tuple[int, str]) -> None:
        rows = [
            {"image_id": 5, "ann_id": box, "split": split, "sentences": [{"sent": text, "sent_id": f"{n}{text[0]}"}
             for text in ("red cup", "left mug.")]}
            for n, (box, split) in enumerate(parts)
        ]  # fmt: skip
        write(folder / "refs.json", rows)

    task = load_benchmark("coin", coin, check_files=False).task("Grounding")
    references((1, "train"), (1, "testA"), (2, "testA"))
    assert re.search(r"refcoco-2r .*0\.png.*\[0\.10, 0\.20, 0\.10, 0\.35\]", clmoe.refused(*prepare))
    assert not task.train.exists()
    references((2, "train"), (1, "train"), (1, "testA"), (2, "val"))
    assert "Grounding: 2 training records, 2 questions" in (text := clmoe.run(*prepare)) and "2 record(s) left" in text
    assert [record.turns[0].answer for record in load_train(task.train, coin)] == ["[0.10, 0.20, 0.30, 0.35]"] * 2
    first, second = task_questions(task)
    assert first.extra == {"answer_bbox": "[0.10, 0.20, 0.30, 0.35]", "size": [640, 480]}
    assert first.text.endswith("this sentence describes: red cup.") and second.text.endswith(": left mug.")
    written = task.train.read_bytes()
    clmoe.run(*prepare)
    assert task.train.read_bytes() == written
    half_a_task_is_left_alone("coin", "Grounding", coin, clmoe)


def test_cl4vqa_is_built_from_vqa_v2_and_vqacls_division(tmp_path: Path, clmoe: Commands) -> None:
    prepare = ("data", "prepare", "cl4vqa", "--data", tmp_path)
    for part, offset in (("train2014", 0), ("val2014", 1000)):
        draw(tmp_path, f"COCO2014/{part}/COCO_{part}_{7:012d}.jpg", 0)
        asked = [{"question_id": offset + n, "image_id": 7, "question": f"What is {n}?"} for n in range(20)]
        notes = [
            {"question_id": offset + n, "multiple_choice_answer": f"a{n}", "answers": [{"answer": f"a{n}"}] * 10}
            for n in range(20)
        ]
        write(tmp_path / f"VQA_v2/v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        write(tmp_path / f"VQA_v2/v2_mscoco_{part}_annotations.json", {"annotations": notes})
    for n, name in enumerate(ORDERS["cl4vqa"].split()):
        write(tmp_path / f"VQACL/karpathy_train_q_{name}.json", [{"question_id": n}, {"question_id": 1000 + n}])
        write(tmp_path / f"VQACL/karpathy_test_q_{name}.json", [{"question_id": 1010 + n, "sent": "?"}])
    assert "causal: 2 training records, 1 questions" in clmoe.run(*prepare)
    task = load_benchmark("cl4vqa", tmp_path).task("count")
    records = load_train(task.train, tmp_path)
    assert [(r.id, r.image, r.turns[0].answer) for r in records] == [
        ("4", "COCO2014/train2014/COCO_train2014_000000000007.jpg", "a4"),
        ("1004", "COCO2014/val2014/COCO_val2014_000000000007.jpg", "a4"),
    ]
    (question,) = task_questions(task)
    assert (question.question_id, question.answer) == ("1014", "a14")
    assert question.extra == {"answers": ["a14"] * 10}
    assert question.text == "What is 14?\nAnswer the question using a single word or phrase."
    assert clmoe.run("data", "check", "cl4vqa", "--data", tmp_path).count(" 0 bad") == 10
    half_a_task_is_left_alone("cl4vqa", "count", tmp_path, clmoe)
    task.train.unlink()
    task.test.unlink()
    write(tmp_path / "VQACL/karpathy_train_q_count.json", [{"question_id": 5000}])
    assert re.search(r"karpathy_train_q_count\.json: row 0 .*'5000'", clmoe.refused(*prepare))


# ---- answers ----


@pytest.mark.slow
def test_tasks_are_answered_and_scored(tiny_folder: Path, tmp_path: Path, clmoe: Commands) -> None:
    """`clmoe eval` answers with the bare base; if pycocoevalcap or Java is missing, it refuses to score captions."""
    arguments = ["eval", "--checkpoint", "base", "--model", tiny_folder, "--output", tmp_path / "run"]
    arguments += ["--benchmark", "ucit", "--data", TREES["ucit"](tmp_path / "ucit"), "model.dtype=float32"]
    tasks = {"IconQA": 0, "Flickr30k": 7}  # number of figures besides the score
    if not CAN_CAPTION:
        assert "'captions'" in clmoe.refused(*arguments)
        del tasks["Flickr30k"]
    clmoe.run(*arguments, "--tasks", ",".join(tasks))
    for task, parts in tasks.items():
        summary = json.loads((tmp_path / f"run/predictions/zero_shot/{task}.json").read_text())
        assert (summary["questions"], len(summary["parts"])) == (ROWS, parts) and 0 <= summary["score"] <= 100


def test_answers_written_elsewhere(coin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script, file = load_script("score"), coin / "merge.jsonl"
    rows = [{"question_id": n, "prompt": "?", "text": ("Mug", "unanswerable")[n % 2], "metadata": {}} for n in range(7)]
    file.write_text("\n".join(json.dumps(row) for row in reversed(rows)) + "\n")
    arguments = ["coin", "VizWiz", str(file), "--data", str(coin)]
    script.main(arguments)
    assert capsys.readouterr().out == "Samples: 8\nAccuracy: 87.50%\n"
    script.main([*arguments, "--scoring", "official"])
    assert capsys.readouterr().out == "Samples: 7\nAccuracy: 100.00%\n"
    broken = [{"question_id": n, "text": "Mug\u2028mug\x85"} for n in range(7)]  # Unicode's line breaks end no line
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in broken), encoding="utf-8")
    assert script.main(arguments).percent == 0
    for content in (b'{"question_id": 1}\n', b"{\xff"):
        file.write_bytes(content)
        with pytest.raises(ClmoeError, match=r"merge\.jsonl: .*line 1"):
            script.main(arguments)
