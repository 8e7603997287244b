"""A training step on packed rows, five records to an image, against the same records as separate samples.

    OMP_NUM_THREADS=1 python scripts/bench/step.py [--base playground|llava] [--batch 20] [--repeats 5] [--json]

Forward and backward of one global batch of MoELoRA (eight experts, total rank 64, and the projector), without
reading files. Both forms run in one process on the same weights, interleaved; times are CPU seconds of the process,
which preemption does not lengthen, and their medians.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

from five_questions import QUESTIONS, Peak, adapted, figures, open_base, records, write_images
from torch import Tensor

from clmoe.data.batches import train_dataset
from clmoe.data.collate import collate_train
from clmoe.data.packing import collate_packed
from clmoe.train.loss import TrainedModel


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds and peak memory of a step in both forms, and how far loss and gradients differ."""
    base = open_base(args.base)
    names = write_images(root, args.batch // len(QUESTIONS), base.model.config.vision_config.image_size)
    dataset = train_dataset(base, records(names), root, 2048)
    model = TrainedModel(*adapted(base), args.batch).train()
    items, pad = dataset.__getitems__(range(args.batch)), base.tokenizer.pad_token_id
    forms = {"separate": collate_train(items, pad), "packed": collate_packed(items, pad)}
    answers = (forms["separate"]["labels"] != -100).sum()
    results: dict[str, tuple[Tensor, list[Tensor]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, float] = {}
    for turn in range(args.repeats + 1):
        for name, batch in forms.items():
            model.zero_grad()
            peak, start = Peak(), time.process_time()
            loss = model(**batch, num_items_in_batch=answers)["loss"]
            loss.backward()
            if turn:
                seconds[name].append(time.process_time() - start)
            peaks[name] = peak.mib()
            results[name] = loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]
    (loss, gradients), (expected, oracle) = results["packed"], results["separate"]
    tokens = {
        "separate": int(forms["separate"]["attention_mask"].sum()),
        "packed": int((forms["packed"]["packed_segments"] >= 0).sum()),
    }
    times = {name: median(values) for name, values in seconds.items()}
    pairs = zip(gradients, oracle, strict=True)
    return {
        "samples": args.batch,
        **{f"{name}_tokens": count for name, count in tokens.items()},
        **{f"{name}_seconds": value for name, value in times.items()},
        **{f"{name}_samples_per_cpu_second": args.batch / value for name, value in times.items()},
        **{f"{name}_peak_mib": value for name, value in peaks.items()},
        "times_faster": times["separate"] / times["packed"],
        "loss_relative_difference": float((loss - expected).abs() / expected),
        "largest_gradient_relative_difference": max(float((a - b).norm() / b.norm()) for a, b in pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=("playground", "llava"), default="playground")
    parser.add_argument("--batch", type=int, default=20, help=f"a multiple of {len(QUESTIONS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = figures(measure, args)
    if found is None:
        return
    print(f"{args.base}, {args.repeats} repeats")
    for name, value in found.items():
        print(f"{name:40s} {value:10.4g}")


if __name__ == "__main__":
    main()
