#!/usr/bin/env bash
# Set up an environment with the development tools and run every check and test.
source "$(dirname "$0")/common.sh"
setup dev
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
