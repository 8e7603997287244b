"""The model card of a checkpoint: a README.md as the hub wants it, the same bytes for equal checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from clmoe.config import Config
from clmoe.methods.base import method_class
from clmoe.train.lineage import Lineage

UNMEASURED = "Not in this card yet: it was written before the evaluation. `clmoe card CHECKPOINT` adds the scores.\n"

CARD = """\
---
{front}---

# {title}

{about}

An adapter of the language model of `{base}`, trained with the Python package `clmoe`; the base's own
weights are unchanged.

## Tasks

Learned {manner}:

{tasks}

## How to load

With clmoe installed, this folder at hand as `checkpoint` (`hf download OWNER/NAME --local-dir checkpoint`), and the
path of the base, to ask it something ({finding}):

```python
import clmoe

checkpoint = clmoe.load("checkpoint", model="{base}")
print(checkpoint.answer("photo.png", "What is in the image?"))
```

As a model of transformers and peft{routing}:

```python
import clmoe  # makes the adapter known to peft
from peft import PeftModel
from transformers import LlavaForConditionalGeneration

base = LlavaForConditionalGeneration.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "checkpoint")
```

## Scores

{scores}
## Training

{training}

`config.yaml` holds every setting, `continual.json` the history, `manifest.json` the hashes of all files but this one.
"""


def model_card(config: Config, lineage: Lineage, scores: str = UNMEASURED) -> str:
    """The card's text.

    Args:
        scores: Markdown of the section on scores, which are known only after the checkpoint is finished.
    """
    method = method_class(config.method)
    base = base_name(config.model.path)
    finds = method.finds_task
    return CARD.format(
        front=_front_matter(config, lineage, base),
        title=f"{config.name} on {lineage.benchmark}, after {lineage.tasks[-1]}",
        about=str(sys.modules[method.__module__].__doc__).splitlines()[0],
        base=base,
        manner="together" if method.chain == "union" else "one after the other, in this order",
        tasks="\n".join(f"{number}. {task}" for number, task in enumerate(lineage.tasks, 1)),
        finding="the question's task is found from the question itself" if finds else "this method needs no task",
        routing=", which answers once a routing is chosen (`clmoe.routing`)" if finds else "",
        scores=scores,
        training=_training(lineage),
    )


def base_name(path: str) -> str:
    """How a card names the base: as the configuration does, but of a folder elsewhere on this machine only its name."""
    return Path(path).name if path.startswith(("/", "~", ".")) else path


def _front_matter(config: Config, lineage: Lineage, base: str) -> str:
    values = {
        "base_model": base,
        "datasets": [lineage.benchmark],
        "library_name": "peft",
        "pipeline_tag": "image-text-to-text",
        "tags": list(dict.fromkeys(["clmoe", "continual-learning", "llava", "lora", config.method])),
    }
    return yaml.safe_dump(values, sort_keys=True)


def _training(lineage: Lineage) -> str:
    rows = {
        "seed": str(lineage.seed),
        "optimizer steps of the newest task": f"{lineage.steps:,}",
        "parameters trained on it": f"{lineage.trainable_parameters:,}",
        "parameters of the adapter": f"{lineage.adapter_parameters:,}",
        "base (sha256 of config and weights)": f"`{lineage.base}`",
        **dict(sorted(lineage.versions.items())),
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
