"""The base models: what is particular to LLaVA-1.5, its inputs, and kept vision features."""
