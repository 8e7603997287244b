#!/usr/bin/env bash
# Set up an environment with the development tools and run every check and test.
source "$(dirname "$0")/common.sh"
setup dev
cd "$ROOT"
ruff check .
ruff format --check .
mypy
# Files are shared out to one process per core; -n 0 runs all of them in this one, as a debugger needs it.
python -m pytest -n "$(cores)" --maxprocesses 8 --dist loadfile "$@"
