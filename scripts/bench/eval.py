"""Evaluation in batches on shared image prefixes, against questions answered one by one, five questions per image.

    OMP_NUM_THREADS=1 python scripts/bench/eval.py [--base llava] [--images 32] [--batch 64] [--json]

The reference gives every question to transformers' ``generate`` alone. All forms run in one process on one adapted
model (MoELoRA, eight experts, total rank 64, random up-projections), reading images included. Times are CPU seconds of
the process, which preemption does not lengthen, or a GPU's if there is one (`--base llava-7b` is for that). Those of
exact mode include the questions that it answers again. The roofline's fraction is a form's FLOPs per second, without
attention's, over those of one large matrix product; `times_its_products` divides its time by that of its own products,
each the best of three (on the playground's base only: the repetition keeps all factors).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from operator import eq
from pathlib import Path
from typing import Any

import torch
from clock import Peak, Products, best_rate, device_name, flops, timed
from five_questions import BASES, adapted, figures, open_base, questions, write_images
from transformers import GenerationConfig

from clmoe.bases.inputs import prompt_dataset, to_device
from clmoe.bases.llava import LoadedBase
from clmoe.config import EvaluationConfig
from clmoe.data.batches import collate_prompts
from clmoe.data.records import Question
from clmoe.evaluate.answer import Answer, Answerer
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import experts_by_linear


@torch.no_grad()
def one_by_one(answerer: Answerer, asked: list[Question], root: Path, new_tokens: int) -> list[str]:
    """The plain way: a batch of one, transformers' own loop."""
    tokenizer = answerer.base.tokenizer
    plan = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    dataset, texts = prompt_dataset(answerer.base, asked, root), []
    llava = adapted_base(answerer.model)  # type: ignore[arg-type]
    for row in range(len(asked)):
        inputs = to_device(collate_prompts([dataset[row]], tokenizer.pad_token_id), answerer.base)
        said = llava.generate(**inputs, generation_config=plan)
        texts.append(tokenizer.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return texts


def measure(args: argparse.Namespace, root: Path, base: LoadedBase | None = None) -> dict[str, Any]:
    """CPU seconds and peak memory of each form, and how its answers compare with the reference's."""
    base = base or open_base(args.base)
    model, method = adapted(base)
    for experts in experts_by_linear(model).values():
        experts.freeze_as(base.dtype)
    side = base.model.config.vision_config.image_size
    asked = questions(write_images(root, args.images, side))
    answerer = Answerer(base, model, method, 0, None)
    rate = best_rate(base.model.dtype)

    def form(work: Callable[[], list[str]]) -> tuple[dict[str, Any], list[str]]:
        peak = Peak()
        spent, texts = timed(work)
        found = {"seconds": spent, "peak_mib": peak.mib()}
        return found if args.uncounted else found | {"roofline_fraction": flops(work) / spent / rate}, texts

    one_by_one(answerer, asked[:5], root, args.new_tokens)
    reference, expected = form(lambda: one_by_one(answerer, asked, root, args.new_tokens))
    found: dict[str, Any] = {"questions": len(asked), "one by one": reference}
    for name, settings in {
        "batched, exact": {"share_images": False},
        "shared, exact": {},
        "batched, fast": {"share_images": False, "exact": False},
        "shared, fast": {"exact": False},
    }.items():
        answerer.config = EvaluationConfig(batch_size=args.batch, **settings)  # type: ignore[arg-type]
        answers: list[Answer] = []

        def batched() -> list[str]:
            answers[:] = answerer.answer(asked, root, args.new_tokens)  # noqa: B023, called at once
            return [answer.text for answer in answers]  # noqa: B023

        measured, texts = form(batched)
        found[name] = {
            **measured,
            "times_faster": reference["seconds"] / measured["seconds"],
            "identical_percent": 100 * sum(map(eq, texts, expected)) / len(asked),
            "redone": sum(answer.redone for answer in answers),
        }
        if not args.uncounted and args.base == "playground":
            with Products() as products:
                batched()
            whole, alone = (min(timed(work)[0] for _ in range(3)) for work in (batched, products.repeat))
            found[name]["times_its_products"] = whole / alone
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="playground")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--batch", type=int, default=EvaluationConfig().batch_size)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--uncounted", action="store_true", help="leave out the FLOPs, for which every form runs again")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = figures(measure, args)
    if found is None:
        return
    print(f"{args.base}: {found.pop('questions')} questions, five to an image, batch {args.batch}, {device_name()}")
    for name, values in found.items():
        print(f"{name:16s} " + "  ".join(f"{key} {value:.4g}" for key, value in values.items()))


if __name__ == "__main__":
    main()
