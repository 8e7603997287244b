"""``python -m clmoe``, for when the command ``clmoe`` is not on the path."""

from clmoe.cli import main

main()
