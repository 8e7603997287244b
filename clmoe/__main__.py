"""``python -m clmoe``, for where the command ``clmoe`` is not on the path."""

from clmoe.cli import main

main()
