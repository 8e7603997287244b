"""``clmoe card``: a checkpoint's model card with its scores."""

from __future__ import annotations

from argparse import Namespace


def run(options: Namespace) -> str:
    """``clmoe card``; returns the path written."""
    from clmoe.report.card import measured_scores
    from clmoe.train.card import model_card
    from clmoe.train.checkpoint import CARD
    from clmoe.train.lineage import read_checkpoint
    from clmoe.utils.files import write_text

    done = read_checkpoint(options.checkpoint)
    scores = measured_scores(done, options.run or options.checkpoint.resolve().parent)
    output = options.output or options.checkpoint / CARD
    write_text(output, model_card(done.config, done.lineage, scores))
    return f"written: {output}"
