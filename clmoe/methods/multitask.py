"""LoRA on the union of all tasks at once: the upper bound that sees everything."""

from clmoe.methods.lora import Lora


class Multitask(Lora):
    """Trained once; ``training.steps`` counts per task, so the union gets the same number of samples of each."""

    chain = "union"


METHOD = Multitask
