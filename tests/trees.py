"""Miniature trees of the real benchmarks: eight invented rows per file, in exactly the published formats."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

ROWS = 8
WORD = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
COLOURS = ["red", "green", "blue", "grey", "pink", "white", "black", "brown"]

Rows = list[dict[str, Any]]


def write(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))


def draw(root: Path, name: str, number: int) -> str:
    """Draw a small picture, wide, tall and square in turn; return its name."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", [(24, 16), (16, 24), (20, 20)][number % 3], COLOURS[number % 8]).save(path)
    return name


def train_row(key: Any, image: str | None, question: str, answer: str) -> dict[str, Any]:
    mark = "" if image is None else "<image>\n"
    turns = [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": key, **({} if image is None else {"image": image}), "conversations": turns}


def short_rows(
    root: Path, images: str, number_type: Callable[[int], Any], question: str, answers: list[str]
) -> tuple[Rows, Rows]:
    """Training and test rows of a task with one short answer per question."""
    train, test = [], []
    for n in range(ROWS):
        image = draw(root, f"{images}/{n}.png", n)
        answer = answers[n % len(answers)]
        train.append(train_row(f"t{n}", image, question, answer))
        test.append({"question_id": number_type(n), "image": image, "text": question, "answer": answer})
    return train, test


def _save(root: Path, folder: str, train: Rows, test: Rows, train_name: str, test_name: str) -> None:
    write(root / folder / f"{train_name}.json", train)
    write(root / folder / f"{test_name}.json", test)


def coin(root: Path) -> Path:
    def save(name: str, train: Rows, test: Rows, part: str = "test") -> None:
        _save(root, f"Instructions/{name}", train, test, "train", part)

    _scienceqa(root, save)
    train, test = short_rows(root, "TextVQA/train_images", int, "What is written?" + WORD, ["cola", "stop"])
    save("TextVQA", train, [{k: v for k, v in row.items() if k != "answer"} for row in test], "val")
    gt = [{"question_id": row["question_id"], "answers": [row["answer"]] * 7 + ["coke"] * 3} for row in test]
    write(root / "TextVQA/TextVQA_0.5.1_val.json", {"data": gt})
    save("ImageNet", *short_rows(root, "ImageNet/val", int, "What is the object in the image?" + WORD, ["Owl", "Tub"]))
    train, test = short_rows(root, "GQA/images", str, "On which side is it?" + WORD, ["left", "right"])
    save("GQA", train, test)
    gqa = {row["question_id"]: {"answer": row["answer"], "isBalanced": True, "semantic": []} for row in test}
    write(root / "GQA/testdev_balanced_questions.json", gqa)
    save("VizWiz", *short_rows(root, "VizWiz/val", int, "What is this?" + WORD, ["mug", "unanswerable"]), "val")
    coco = "COCO2014/train2014"
    ask = "Please provide the bounding box coordinate of the region this sentence describes: red cup."
    train, test = short_rows(root, coco, int, ask, ["[0.12, 0.30, 0.50, 0.94]"])
    for row in test:
        row |= {"answer_bbox": row.pop("answer"), "size": [24, 16]}
    save("Grounding", train, test)
    save("VQAv2", *short_rows(root, coco, int, "Is it dark?" + WORD, ["yes", "no"]), "val")
    save("OCRVQA", *short_rows(root, "OCR-VQA/images", str, "Who is the author?" + WORD, ["Jane Austen", "Homer"]))
    return root


def _scienceqa(root: Path, save: Callable[[str, Rows, Rows], None]) -> None:
    """Write ScienceQA, where every second question has no image."""
    train, test, problems = [], [], {}
    for n in range(ROWS):
        image = None if n % 2 else draw(root, f"ScienceQA/images/test/{n}/image.png", n)
        asked = "Which is a solid?\nContext: N/A\nOptions: (A) ice (B) steam" + LETTER
        train.append(train_row(str(n), image, asked, "AB"[n % 2]))
        mark = "" if image is None else "<image>\n"
        row = {"question_id": str(n), "text": mark + asked, "answer": "AB"[n % 2]}
        test.append(row if image is None else {**row, "image": image})
        problems[str(n)] = {"choices": ["ice", "steam"], "answer": n % 2}
    save("ScienceQA", train, test)
    write(root / "ScienceQA/problems.json", problems)
    write(root / "ScienceQA/pid_splits.json", {"test": [str(n) for n in range(ROWS)]})


def cl4vqa(root: Path) -> Path:
    """Write the authors' files, which have one answer per question and no annotators."""
    answers = {"judge": ["yes", "no"], "count": ["2", "3"], "color": COLOURS}
    words = "recognition location judge commonsense count action color type subcategory causal"
    for task in words.split():
        question = f"What about the {task}?" + WORD
        train, test = short_rows(root, "COCO2014/train2014", int, question, answers.get(task, ["dog", "cat"]))
        write(root / f"train/train_q_{task}.json", train)
        write(root / f"test/test_q_{task}.json", test)
    return root


def ucit(root: Path) -> Path:
    def save(name: str, train_name: str, question: str, answers: list[str]) -> None:
        _save(root, name, *short_rows(root, f"{name}/images", int, question, answers), train_name, "test_3000")

    save("ImageNet-R", "train", "What is it?" + WORD, ["Goldfish", "Owl"])
    save("ArxivQA", "train_4w", "What is it?" + WORD, ["A", "C"])
    save("IconQA", "train", "What is it?" + WORD, ["B", "5"])
    save("CLEVR-Math", "train_4w", "What is it?" + WORD, ["3", "10"])
    texts = [f"A {colour} mug on a desk." for colour in COLOURS]
    notes = [{"image_id": n + 1, "caption": text} for n in range(ROWS) for text in (texts[n], "Mug on table.")]
    for name, train_name in (("VizWiz-caption", "train"), ("Flickr30k-cap", "train_brief_4w")):
        save(name, train_name, "Describe the image briefly.", texts)
        gt = {"images": [{"id": n + 1} for n in range(ROWS)], "annotations": notes}
        write(root / name / "val_coco_type_3000.json", gt)
    return root


def mllm_dcl(root: Path) -> Path:
    sets = {
        "RS": ("Is there a road?", ["yes", "no"]),
        "Med": ("What is shown?", ["liver", "no"]),
        "AD": ("Which car is ahead?", ["the red car", "B"]),
        "Sci": ("Which states are red?", ["Ohio, Texas", "Utah"]),
        "Fin": ("Will it rise?", ["Yes", "B"]),
    }
    for name, (question, answers) in sets.items():
        train, test = short_rows(root / name, "images", int, question, answers)
        if name == "Sci":
            for n, row in enumerate(test):
                kind = ("AI2D", "MapQA")[n % 2]
                row["image"] = draw(root / name, f"images/{kind}_{n}.png", n)
        _save(root, name, train, test, "train", "test")
    return root


TREES: dict[str, Callable[[Path], Path]] = {"coin": coin, "cl4vqa": cl4vqa, "ucit": ucit, "mllm_dcl": mllm_dcl}
