"""Records, images, prompts and batches. Imports nothing: reading a question file must not load torch."""
