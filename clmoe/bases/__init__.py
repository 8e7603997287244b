"""The base models: what is specific to a family of them, its inputs, and cached vision features."""
