"""Hours of one epoch of CoIN and of CL4VQA on LLaVA-1.5, from FLOPs at a stated share of a card's rate; nothing runs.

    python scripts/bench/hours.py [--base llava-1.5-7b] [--mfu 0.4] [--tokens 640]

A record has its image's 576 tokens and 64 of text, 16 of them answers. Every method is counted as on its first task,
without recomputation. Not counted: probes, statistics, locators, loading, waiting, generated tokens after the first.
"""

import argparse

from clmoe.config import load_config
from clmoe.methods import method_class
from clmoe.plan import first_task
from clmoe.plan.cost import MFU, answer_flops, card, step_flops

METHODS = ("lora", "moelora", "clmoe", "clmoe_released", "llava_cmoe", "multitask")
CARDS = ("A100", "H100")
TRAINED = {"CoIN": 569_000, "CL4VQA": 537_503}
"""Records of all tasks: CoIN's paper prints thousands, VQACL's supplement units. `clmoe data check` counts yours."""
ANSWERS = 16


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="llava-1.5-7b")
    parser.add_argument("--mfu", type=float, default=MFU)
    parser.add_argument("--tokens", type=int, default=640)
    args = parser.parse_args(arguments)
    print(
        f"| method | trained, M | TFLOP a record | {' | '.join(f'{b}, {c}' for b in TRAINED for c in CARDS)} | ", end=""
    )
    print(f"{' | '.join(f'1,000 answers, {c}' for c in CARDS)} |")
    print("|---|" + "---:|" * (2 + (len(TRAINED) + 1) * len(CARDS)))
    for name in METHODS:
        config = load_config(name, {}, [], args.base)
        first = first_task(method_class(config.method)(config))
        sizes = first.shapes, first.image
        adapter, tuned = first.count("expert") + first.count("router"), first.count("projector") > 0
        record = step_flops(*sizes, 1, args.tokens, ANSWERS, adapter, tuned)
        hours = [[record * n / args.mfu / card(c).rate / 3600 for c in CARDS] for n in TRAINED.values()]
        answers = [1000 * answer_flops(*sizes, args.tokens, adapter) / args.mfu / card(c).rate / 3600 for c in CARDS]
        cells = [f"{hour:.1f}" for pair in hours for hour in pair] + [f"{hour:.3f}" for hour in answers]
        print(f"| `{name}` | {first.count() / 1e6:.1f} | {record / 1e12:.1f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
