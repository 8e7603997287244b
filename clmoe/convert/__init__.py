"""Other projects' checkpoints, converted to ours. Only this room reads pickles, and it never runs one."""
