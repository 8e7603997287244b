#!/usr/bin/env bash
# Rebuilds playground/base, the pre-trained base of the embedded benchmark. About half an hour on one core.
#   bash scripts/playground/build_base.sh [OUT]        (default OUT: playground/base)
# One thread, so that the order of additions, and with it every weight, repeats on the same machine.
set -euo pipefail
cd "$(dirname "$0")/../.."
OUT=${1:-playground/base}
PYTHON=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONHASHSEED=0

WORK=$(mktemp -d "${OUT%/}.XXXXXX")
trap 'rm -rf "$WORK"' EXIT
"$PYTHON" -m clmoe.benchmarks.playground.pretrain "$WORK"
"$PYTHON" -m clmoe.benchmarks.playground.probe "$WORK"
mkdir -p "$OUT"
mv "$WORK"/* "$OUT"/
