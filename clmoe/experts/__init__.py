"""LoRA experts as a peft tuner: configuration, layers, model, routers, and the forward passes of an adapted model."""
