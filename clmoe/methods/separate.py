"""A fresh LoRA for each task: what a task can reach alone, the bound of the immediate scores."""

from clmoe.methods.lora import Lora


class Separate(Lora):
    """No task continues another."""

    chain = "separate"


METHOD = Separate
