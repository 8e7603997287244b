"""Training of one task, its checkpoint, and the order of its samples."""
