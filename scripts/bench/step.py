"""A training step against the published way: experts in a loop and logits at every token.

    OMP_NUM_THREADS=1 python scripts/bench/step.py [--base llava] [--batch 20] [--repeats 5] [--json]

Forward and backward of one global batch of MoELoRA (eight experts, total rank 64, and the projector), without
reading files. Both forms run in one process on the same weights, interleaved, and medians are compared: CPU seconds of
the process, or a GPU's if there is one (`--base llava-7b` is for that). The roofline's fraction is a form's FLOPs per
second, without attention's, over those of one large matrix product.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from clock import Peak, Products, best_rate, device_name, flops, timed
from five_questions import BASES, QUESTIONS, adapted, figures, open_base, records, write_images
from torch import Tensor
from torch.nn.functional import cross_entropy

from clmoe.bases.inputs import to_device, train_dataset
from clmoe.data.batches import collate_train
from clmoe.data.prompts import IGNORE
from clmoe.experts import layer
from clmoe.experts.forward import adapted_base
from clmoe.experts.layer import loop_experts
from clmoe.train.loop import TrainedModel


@contextmanager
def looped() -> Iterator[None]:
    """Inside, experts are computed one after the other, as the published code does."""

    def loop(x: Tensor, gate: Tensor, A: Tensor, B: Tensor, scaling: float, out: Tensor, *unused: object) -> Tensor:
        return loop_experts(x, gate, A, B, scaling, out)

    apart = patch.object(layer.Experts, "_takes_over", lambda *unused: False)
    with apart, patch.object(layer, "packed_experts", loop):
        yield


def plain_loss(model: TrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy from the logits of all tokens."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with looped():
        logits = adapted_base(model.model)(**inputs, use_cache=False).logits.float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORE)


def differences(found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]]) -> tuple[float, float]:
    """Relative differences: that of the loss, and the largest of a parameter's gradient."""
    pairs = zip(found[1], wanted[1], strict=True)
    gradient = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return float((found[0] - wanted[0]).abs() / wanted[0]), gradient


def measure(args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Seconds, peak memory and FLOPs of a step in each form, and how far loss and gradients differ."""
    base = open_base(args.base)
    names = write_images(root, args.batch // len(QUESTIONS), base.model.config.vision_config.image_size)
    dataset = train_dataset(base, records(names), root, 2048)
    model = TrainedModel(*adapted(base), args.batch).train()
    items, pad = dataset.__getitems__(range(args.batch)), base.tokenizer.pad_token_id
    batch = to_device(collate_train(items, pad), base)
    answers = (batch["labels"] != IGNORE).sum()
    forms: dict[str, Callable[[], Tensor]] = {
        "plain": lambda: plain_loss(model, batch),
        "ours": lambda: model(**batch, num_items_in_batch=answers)["loss"],
    }

    def step(form: Callable[[], Tensor]) -> Tensor:
        loss = form()
        loss.backward()
        return loss.detach()

    results: dict[str, tuple[Tensor, list[Tensor]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    peaks: dict[str, float] = {}
    for turn in range(args.repeats + 1):
        for name, form in forms.items():
            model.zero_grad()
            peak = Peak()
            spent, loss = timed(lambda: step(form))  # noqa: B023, called at once
            if turn:
                seconds[name].append(spent)
            peaks[name] = peak.mib()
            results[name] = loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with Products() as products:
        step(forms["ours"])
    again = median([timed(products.repeat)[0] for _ in range(args.repeats + 1)][1:])
    work = {name: flops(lambda: step(form)) for name, form in forms.items()}  # noqa: B023
    times, rate = {name: median(values) for name, values in seconds.items()}, best_rate(base.model.dtype)
    loss_differs, gradient_differs = differences(results["ours"], results["plain"])
    return {
        "samples": args.batch,
        "tokens": int(batch["attention_mask"].sum()),
        **{f"{name}_seconds": value for name, value in times.items()},
        **{f"{name}_samples_per_second": args.batch / value for name, value in times.items()},
        **{f"{name}_peak_mib": value for name, value in peaks.items()},
        **{f"{name}_gflop": value / 1e9 for name, value in work.items()},
        **{f"{name}_roofline_fraction": work[name] / times[name] / rate for name in forms},
        "times_faster": times["plain"] / times["ours"],
        "ours_products_seconds": again,
        "ours_times_its_products": times["ours"] / again,
        "loss_relative_difference": loss_differs,
        "largest_gradient_relative_difference": gradient_differs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="playground")
    parser.add_argument("--batch", type=int, default=20, help=f"a multiple of {len(QUESTIONS)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = figures(measure, args)
    if found is None:
        return
    print(f"{args.base}, {device_name()}, {args.repeats} repeats")
    for name, value in found.items():
        print(f"{name:44s} {value:10.4g}")


if __name__ == "__main__":
    main()
