"""UCIT: reference captions. Order, files and rules of its six tasks are in ``configs/benchmarks/ucit.yaml``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

from clmoe.benchmarks.entries import answered_one_by_one, entries, listed
from clmoe.data.records import Failed, Question
from clmoe.errors import ClmoeError


def coco_captions(files: Sequence[Path], questions: Sequence[Question], failed: Failed | None = None) -> list[Question]:
    """The reference captions of each question's image, in ``extra["captions"]``.

    The published files number their images by the test file: image n belongs to the n-th question, from 1. Where the
    images' ids are the question ids themselves, those decide.

    Raises:
        ClmoeError: as many images as questions are needed, each with a caption; and where images have a
            ``file_name``, it must be the question's.
    """
    (file,) = files
    data = entries(file)
    images = {str(image.get("id")): image for image in listed(file, "images", data)}
    if len(images) != len(questions):
        raise ClmoeError(
            f"{file}: {len(images)} images for {len(questions)} questions; take both files of the same release"
        )
    captions: dict[str, list[str]] = {}
    for row in listed(file, "annotations", data):
        captions.setdefault(str(row.get("image_id")), []).append(str(row.get("caption", "")))
    by_id = images.keys() == {question.question_id for question in questions}
    numbers = {question.question_id: str(number) for number, question in enumerate(questions, 1)}

    def answered(question: Question) -> Question:
        name = question.question_id if by_id else numbers[question.question_id]
        if name not in images or not any(text.strip() for text in captions.get(name, [])):
            raise ClmoeError(f"{file}: no captions of image {name!r} for question_id {question.question_id!r}")
        of_image = images[name].get("file_name")
        if of_image and PurePosixPath(str(of_image)).name != PurePosixPath(question.image or "").name:
            raise ClmoeError(f"{file}: image {name!r} is {of_image!r}, but question_id {question.question_id!r} is "
                             f"about {question.image!r}; take both files of the same release")  # fmt: skip
        texts = [text for text in captions[name] if text.strip()]
        return replace(question, extra={**question.extra, "captions": texts})

    return answered_one_by_one(questions, answered, failed)
