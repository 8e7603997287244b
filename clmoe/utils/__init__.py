"""Files, tensors on disk, processes, logs and names: what every room uses."""
