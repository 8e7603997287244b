"""Records, images, prompts and batches; knows no model."""
