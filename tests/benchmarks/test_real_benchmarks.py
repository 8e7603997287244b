"""The real benchmarks on miniature trees in their formats: gold files, checks, builders, and a full evaluation."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from clmoe import cli
from clmoe.benchmarks.base import load_benchmark, task_questions
from clmoe.benchmarks.coin import padded_box
from clmoe.config import load_config
from clmoe.data.records import load_questions, load_train
from clmoe.errors import ClmoeError
from clmoe.evaluate.rules.scoring import check_scorer, gold_problem, score_answers
from clmoe.methods.base import Phase
from clmoe.train.task import _phase_steps, load_records, prepare_request
from tests.support import load_script
from tests.trees import ROWS, TREES, draw, train_row, write

CAN_CAPTION = find_spec("pycocoevalcap") is not None and shutil.which("java") is not None
ORDERS = {
    "coin": "ScienceQA TextVQA ImageNet GQA VizWiz Grounding VQAv2 OCR-VQA",
    "cl4vqa": "recognition location judge commonsense count action color type subcategory causal",
    "ucit": "ImageNet-R ArxivQA VizWiz-caption IconQA CLEVR-Math Flickr30k",
    "mllm_dcl": "RS Med AD Sci Fin",
}


@pytest.fixture(params=TREES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tree(name: str, tmp_path: Path) -> Path:
    return TREES[name](tmp_path / name)


def run_cli(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    cli.main(list(arguments))
    return capsys.readouterr().out


def refused(*arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_order_files_and_gold_answers(name: str, tree: Path) -> None:
    benchmark = load_benchmark(name, tree)
    assert [task.name for task in benchmark.tasks] == ORDERS[name].split()
    for task in benchmark.tasks:
        assert len(load_train(task.train, task.image_root)) == ROWS
        questions = task_questions(task)
        assert len(questions) == ROWS
        assert [gold_problem(task.scorer, question) for question in questions] == [None] * ROWS
        assert all(question.text.endswith(task.suffix) for question in questions)


def test_passes_multiply_the_epochs_of_a_task_and_its_share_of_the_union(tmp_path: Path, tiny_folder: Path) -> None:
    benchmark = load_benchmark("mllm_dcl", TREES["mllm_dcl"](tmp_path / "tree"))
    settings = ["training.batch_size=4", "training.micro_batch_size=2"]
    steps = {}
    for method, names in (("lora", ["RS", "Med", "Sci"]), ("multitask", ["all"])):
        config = load_config(method, benchmark.recipe, settings, str(tiny_folder))
        for name in names:
            order = [task.name for task in benchmark.tasks]
            request = prepare_request(config, benchmark, name, order, None, tmp_path / "run" / name)
            records, root = load_records(request)
            phase = Phase("trained", records, root, lambda context: None, lambda context: None)
            steps[name] = _phase_steps(request, phase)
            if name == "Med":
                assert _phase_steps(request, replace(phase, of_task=False)) == 2, "of a warm-up before it"
    assert steps == {"RS": 2, "Med": 6, "Sci": 4, "all": 2 + 6 + 2 + 4 + 2}


def test_no_question_depends_on_its_answer(tmp_path: Path) -> None:
    """MLLM-DCL's published script gives Fin's questions a suffix by the expected answer, and all of Med's the same."""
    benchmark = load_benchmark("mllm_dcl", TREES["mllm_dcl"](tmp_path))
    texts = {task.name: {question.text for question in task_questions(task)} for task in benchmark.tasks}
    assert all(len(of_task) == 1 for of_task in texts.values())
    assert texts["Med"].pop().endswith("? Answer the question with a single word (or phrase).")
    assert not texts["Fin"].pop().endswith((".", "C, D."))
    assert [task.passes for task in benchmark.tasks] == [1, 3, 1, 2, 1]


def test_gold_answers_score_full_marks_and_silence_none(name: str, tree: Path) -> None:
    for task in load_benchmark(name, tree).tasks:
        if task.scorer == "captions":
            continue
        questions = task_questions(task)
        said = [q.answer or (q.extra.get("answers") or [q.extra.get("answer_bbox")])[0] for q in questions]
        assert score_answers(task.scorer, said, questions).score == pytest.approx(1.0), task.name
        assert score_answers(task.scorer, [""] * ROWS, questions).score == 0.0


def test_check_counts_and_finds_nothing(name: str, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_cli("data", "check", name, "--data", str(tree), capsys=capsys)
    for task in ORDERS[name].split():
        assert f"{task:<16}{ROWS:>7} train {ROWS:>7} test {0:>7} bad" in text
    assert "different images decoded" in text
    assert ("without ten annotators" in text) == (name in ("coin", "cl4vqa"))


def test_check_lists_everything_that_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = TREES["mllm_dcl"](tmp_path)
    (tree / "RS/images/0.png").write_bytes(b"no image")
    (tree / "AD/images/3.png").unlink()
    edit(tree / "Med/train.json", lambda rows: rows[2].update(id=1.5))
    edit(tree / "Med/test.json", lambda rows: rows[4].update(question_id="3"))  # an int 3 is there already
    edit(tree / "Fin/test.json", lambda rows: rows[5].update(answer=" ."))
    (tree / "Sci/train.json").write_text('[{"id": ')
    listing = tmp_path / "bad.txt"
    error = refused("data", "check", "mllm_dcl", "--data", str(tree), "--bad", str(listing), capsys=capsys)
    bad = listing.read_text().splitlines()
    assert len(bad) == 7
    assert f"clmoe data: {len(bad)} bad" in error
    for expected in (
        "RS/images/0.png: cannot be decoded",
        "AD/train.json: row 3 (from 0), id 't3', field 'image': no file",
        "AD/test.json: row 3 (from 0), id 3, field 'image': no file",
        "Med/train.json: row 2 (from 0), id 1.5, field 'id'",
        "Med/test.json: row 4 (from 0), id '3', field 'question_id': already used by row 3",
        "Fin/test.json: question 5: scorer 'stock' would take no answer for ' .', not even itself",
        "Sci/train.json: line 1, column",
    ):
        assert sum(expected in line for line in bad) == 1, expected


def bad_lines(tree: Path, capsys: pytest.CaptureFixture[str]) -> tuple[list[str], str]:
    """What ``data check coin`` lists, and all that it prints."""
    error = refused("data", "check", "coin", "--data", str(tree), capsys=capsys)
    return [line.removeprefix("bad: ") for line in error.splitlines() if line.startswith("bad: ")], error


def test_check_goes_on_after_a_missing_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = TREES["coin"](tmp_path)
    edit(tree / "TextVQA/TextVQA_0.5.1_val.json", lambda data: [data["data"].pop(2), data["data"].pop(4)])
    edit(tree / "GQA/testdev_balanced_questions.json", lambda data: [data.pop("4"), data["5"].update(answer="")])
    edit(tree / "ScienceQA/problems.json", lambda data: [data.pop("3"), data["5"].update(answer=9)])
    edit(tree / "ScienceQA/pid_splits.json", lambda data: data["test"].append("99"))
    bad, _ = bad_lines(tree, capsys)
    assert len(bad) == 7
    for expected in (
        "no entry for question_id '2'", "no entry for question_id '5'", "no entry for question_id '4'",
        "id '5': no 'answer'", "no entry for question_id '3'", "answer 9 is none of its choices",
        "1 of the 9 questions of split 'test' are not in the test file, e.g. '99'",
    ):  # fmt: skip
        assert sum(expected in line for line in bad) == 1, expected


@pytest.mark.parametrize("test_file", ["bad", "missing"])
def test_check_invents_no_further_faults(test_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = TREES["coin"](tmp_path)
    path = tree / "Instructions/ScienceQA/test.json"
    if test_file == "bad":
        edit(path, lambda rows: rows[2].pop("text"))
    else:
        path.unlink()
    (bad,), text = bad_lines(tree, capsys)
    assert bad.startswith(str(path) if test_file == "bad" else f"task ScienceQA, test: no file {path}")
    noted = "ScienceQA: expected answers are looked for once all rows of the test file are good"
    assert (noted in text) == (test_file == "bad")


def test_check_decodes_in_several_processes_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from clmoe.benchmarks import check

    images = [tmp_path / draw(tmp_path, f"{n}.png", n) for n in range(6)]
    images[4].write_bytes(b"")
    alone = check._broken(images)
    monkeypatch.setattr(check, "_IN_THIS_PROCESS", 0)
    assert check._broken(images) == alone
    assert len(alone) == 1


def test_missing_files_are_named_with_their_sources(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES[name](tmp_path)
    task = load_benchmark(name, tree).tasks[-1]
    task.train.unlink()
    for command in ("check", "prepare"):
        error = refused("data", command, name, "--data", str(tree), capsys=capsys)
        assert str(task.train) in error
        assert "https://" in error or "clmoe data prepare" in error
    with pytest.raises(ClmoeError, match=r"no file .*It comes from"):
        load_benchmark(name, tree)


GOLD_FAULTS = {
    "no problem": ("ScienceQA", "ScienceQA/problems.json", lambda d: d.pop("3"), "no entry for question_id '3'"),
    "no choice": ("ScienceQA", "ScienceQA/problems.json", lambda d: d["3"].update(answer=2), "answer 2 is none"),
    "split": (
        "ScienceQA", "ScienceQA/pid_splits.json", lambda d: d["test"].append("99"),
        "1 of the 9 questions of split 'test' are not in the test file, e.g. '99'",
    ),
    "text": ("TextVQA", "TextVQA/TextVQA_0.5.1_val.json", lambda d: d["data"].pop(2), "no entry for question_id '2'"),
    "balanced": (
        "GQA", "GQA/testdev_balanced_questions.json", lambda d: d["4"].update(isBalanced=False), "id '4': isBalanced",
    ),
    "gqa": ("GQA", "GQA/testdev_balanced_questions.json", lambda d: d.pop("4"), "no entry for question_id '4'"),
}  # fmt: skip


@pytest.mark.parametrize("case", GOLD_FAULTS)
def test_missing_gold_names_file_and_id(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, file, change, message = GOLD_FAULTS[case]
    tree = TREES["coin"](tmp_path)
    edit(tree / file, change)
    with pytest.raises(ClmoeError) as caught:
        task_questions(load_benchmark("coin", tree).task(task))
    assert file in str(caught.value)
    assert message in str(caught.value)
    assert message in refused("data", "check", "coin", "--data", str(tree), capsys=capsys)


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
    with pytest.raises(ClmoeError, match=r"image '3' is 'other\.jpg', but question_id '3'"):
        task_questions(task)
    edit(file, lambda data: data["images"].pop())
    with pytest.raises(ClmoeError, match="7 images for 8 questions"):
        task_questions(task)


@pytest.mark.parametrize(
    ("box", "size", "expected"),
    [
        ([10, 20, 30, 40], (100, 100), "[0.10, 0.20, 0.40, 0.60]"),
        ([0, 0, 640, 480], (640, 480), "[0.00, 0.12, 1.00, 0.88]"),  # 80 of 640 above and below
        ([0, 0, 100, 200], (100, 200), "[0.25, 0.00, 0.75, 1.00]"),
        ([-1, 0, 30, 30], (20, 20), "[0.00, 0.00, 1.00, 1.00]"),  # annotations may reach over the edge
    ],
)
def test_boxes_of_the_padded_square(box: list[float], size: tuple[int, int], expected: str) -> None:
    assert padded_box(box, *size) == expected


def test_grounding_is_built_from_refcoco(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = TREES["coin"](tmp_path)
    shutil.rmtree(tree / "Instructions/Grounding")
    error = refused("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
    assert "not built, no" in error
    assert "lichengunc/refer" in error
    image = {"id": 5, "file_name": "0.png", "width": 24, "height": 16}
    write(
        tree / "RefCOCO/refcoco/instances.json", {"images": [image], "annotations": [{"id": 1, "bbox": [6, 4, 12, 8]}]}
    )
    sentences = [{"sent": "red cup", "sent_id": 3}, {"sent": "left mug.", "sent_id": 4}]
    reference = {"image_id": 5, "ann_id": 1, "sentences": sentences}
    write(tree / "RefCOCO/refcoco/refs.json", [{**reference, "split": part} for part in ("train", "val", "testA")])
    text = run_cli("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
    assert "Grounding: 2 training records, 2 questions" in text
    task = load_benchmark("coin", tree).task("Grounding")
    assert [record.turns[0].answer for record in load_train(task.train, tree)] == ["[0.25, 0.33, 0.75, 0.67]"] * 2
    first = task_questions(task)[0]
    assert first.extra == {"answer_bbox": "[0.25, 0.33, 0.75, 0.67]", "size": [24, 16]}
    assert first.text.endswith("this sentence describes: red cup.")
    assert "there already" in run_cli("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
    for there, lacking in ((task.train, task.test), (task.test, task.train)):
        kept, taken = there.read_bytes(), lacking.read_bytes()
        lacking.unlink()
        error = refused("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
        assert f"Grounding: not built, {there} is there without {lacking.name}: delete it, or bring both" in error
        assert not lacking.exists()
        assert there.read_bytes() == kept
        lacking.write_bytes(taken)


def test_a_box_without_area_is_left_out_of_training_and_refused_in_the_test_split(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES["coin"](tmp_path)
    shutil.rmtree(tree / "Instructions/Grounding")
    folder = tree / "RefCOCO/refcoco"
    image = {"id": 5, "file_name": "0.png", "width": 640, "height": 480}
    boxes = [{"id": 1, "bbox": [64, 48, 128, 96]}, {"id": 2, "bbox": [64, 48, 2, 96]}]  # 2 of 640 pixels: 0.10 to 0.10
    write(folder / "instances.json", {"images": [image], "annotations": boxes})

    def references(*parts: tuple[int, str]) -> None:
        rows = [
            {"image_id": 5, "ann_id": box, "split": split, "sentences": [{"sent": "cup", "sent_id": n}]}
            for n, (box, split) in enumerate(parts)
        ]
        write(folder / "refs.json", rows)

    task = load_benchmark("coin", tree, check_files=False).task("Grounding")
    references((1, "train"), (1, "testA"), (2, "testA"))
    error = refused("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
    assert "sentence refcoco-2 about COCO2014/train2014/0.png: box [0.10, 0.20, 0.10, 0.35] has no area" in error
    assert not task.train.exists()
    references((2, "train"), (1, "train"), (1, "testA"), (2, "val"))
    text = run_cli("data", "prepare", "coin", "--data", str(tree), capsys=capsys)
    assert "Grounding: 1 training records, 1 questions" in text
    assert "1 record(s) left out, as their boxes have no area" in text
    assert len(load_train(task.train, tree)) == len(task_questions(task)) == 1


def test_cl4vqa_is_built_from_vqa_v2_and_vqacls_division(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = tmp_path
    names = ORDERS["cl4vqa"].split()
    for part, offset in (("train2014", 0), ("val2014", 1000)):
        image = draw(tree, f"COCO2014/{part}/COCO_{part}_{7:012d}.jpg", 0)
        assert image
        asked = [{"question_id": offset + n, "image_id": 7, "question": f"What is {n}?"} for n in range(20)]
        notes = [
            {"question_id": offset + n, "multiple_choice_answer": f"a{n}", "answers": [{"answer": f"a{n}"}] * 10}
            for n in range(20)
        ]
        write(tree / f"VQA_v2/v2_OpenEnded_mscoco_{part}_questions.json", {"questions": asked})
        write(tree / f"VQA_v2/v2_mscoco_{part}_annotations.json", {"annotations": notes})
    for n, task in enumerate(names):
        write(tree / f"VQACL/karpathy_train_q_{task}.json", [{"question_id": n}, {"question_id": 1000 + n}])
        write(tree / f"VQACL/karpathy_test_q_{task}.json", [{"question_id": 1010 + n, "sent": "?"}])
    text = run_cli("data", "prepare", "cl4vqa", "--data", str(tree), capsys=capsys)
    assert "causal: 2 training records, 1 questions" in text
    task = load_benchmark("cl4vqa", tree).task("count")
    records = load_train(task.train, tree)
    assert [(r.id, r.image, r.turns[0].answer) for r in records] == [
        ("4", "COCO2014/train2014/COCO_train2014_000000000007.jpg", "a4"),
        ("1004", "COCO2014/val2014/COCO_val2014_000000000007.jpg", "a4"),
    ]
    (question,) = task_questions(task)
    assert (question.question_id, question.answer) == ("1014", "a14")
    assert question.extra == {"answers": ["a14"] * 10}
    assert question.text == "What is 14?\nAnswer the question using a single word or phrase."
    assert run_cli("data", "check", "cl4vqa", "--data", str(tree), capsys=capsys).count(" 0 bad") == 10
    task.train.unlink()
    own = task.test.read_bytes()
    error = refused("data", "prepare", "cl4vqa", "--data", str(tree), capsys=capsys)
    assert f"count: not built, {task.test} is there without train_q_count.json: delete it, or bring both" in error
    assert not task.train.exists()
    assert task.test.read_bytes() == own
    task.test.unlink()
    write(tree / "VQACL/karpathy_train_q_count.json", [{"question_id": 5000}])
    assert "question_id '5000' is not in VQA v2" in refused(
        "data", "prepare", "cl4vqa", "--data", str(tree), capsys=capsys
    )


def test_a_question_may_have_its_answer_elsewhere_only_where_the_task_says_so(tmp_path: Path) -> None:
    write(tmp_path / "test.json", [{"question_id": 1, "text": "What?"}])
    with pytest.raises(ClmoeError, match="no expected answer"):
        load_questions(tmp_path / "test.json", tmp_path)
    assert load_questions(tmp_path / "test.json", tmp_path, answered=False)[0].answer == ""
    write(tmp_path / "train.json", [train_row("1", None, "What?", "it")])
    assert load_train(tmp_path / "train.json", tmp_path)[0].id == "1"


def test_every_task_is_answered_and_scored(
    name: str, tree: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`clmoe eval` of the bare base over all tasks; captions where Java is, refused where it is not."""
    tasks = ORDERS[name].split()
    arguments = ["eval", "--checkpoint", "base", "--model", str(tiny_folder), "--benchmark", name, "--data", str(tree)]
    arguments += ["--output", str(tmp_path / "run")]
    settings = ["evaluation.exact=false", "model.dtype=float32", "training.workers=0"]
    if name == "ucit" and not CAN_CAPTION:
        assert "scorer 'captions' needs" in refused(*arguments, *settings, capsys=capsys)
        tasks.remove("Flickr30k")
    if name == "ucit":
        tasks.remove("VizWiz-caption")  # scored as Flickr30k is, and Java is slow to start
    arguments += ["--tasks", ",".join(tasks)]
    run_cli(*arguments, *settings, capsys=capsys)
    for task in tasks:
        summary = json.loads((tmp_path / f"run/predictions/zero_shot/{task}.json").read_text())
        assert summary["questions"] == ROWS
        assert 0 <= summary["score"] <= 100
        assert len(summary["parts"]) == (7 if task in ("VizWiz-caption", "Flickr30k") else 0)


def test_captions_without_java_stop_before_training(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = TREES["ucit"](tmp_path / "ucit")
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("clmoe.evaluate.rules.captions.find_spec", lambda name: object())
    with pytest.raises(ClmoeError, match="needs Java 8 or newer"):
        check_scorer("captions")
    error = refused(
        "train", "--config", "lora", "--model", str(tiny_folder), "--benchmark", "ucit", "--data", str(tree),
        "--task", "VizWiz-caption", "--output", str(tmp_path / "run/01"), "--then-eval", capsys=capsys,
    )  # fmt: skip
    assert "needs Java 8 or newer" in error
    assert not (tmp_path / "run/01").exists()


def test_answers_written_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("score")
    tree = TREES["coin"](tmp_path / "coin")
    rows = [{"question_id": n, "prompt": "?", "text": ("Mug", "unanswerable")[n % 2], "metadata": {}} for n in range(7)]
    (tmp_path / "merge.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)) + "\n")
    arguments = ["coin", "VizWiz", str(tmp_path / "merge.jsonl"), "--data", str(tree)]
    script.main(arguments)
    assert capsys.readouterr().out == "Samples: 8\nAccuracy: 87.50%\n"
    script.main([*arguments, "--scoring", "official"])
    assert capsys.readouterr().out == "Samples: 7\nAccuracy: 100.00%\n"
    (tmp_path / "merge.jsonl").write_text('{"question_id": 1}\n')
    with pytest.raises(ClmoeError, match=r"merge\.jsonl: line 1: expected question_id and text"):
        script.main(arguments)
    broken = [{"question_id": n, "text": "Mug\u2028mug\x85"} for n in range(7)]  # line breaks of Unicode end no line
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in broken)
    (tmp_path / "merge.jsonl").write_text(text, encoding="utf-8")
    assert script.main(arguments).percent == 0
    (tmp_path / "merge.jsonl").write_bytes(b"{\xff")
    with pytest.raises(ClmoeError, match=r"merge\.jsonl: cannot be read as UTF-8 text"):
        script.main(arguments)
    (tmp_path / "merge.jsonl").unlink()
    with pytest.raises(ClmoeError, match=r"merge\.jsonl: cannot be read as UTF-8 text \(.*No such file"):
        script.main(arguments)
