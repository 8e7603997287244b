#!/usr/bin/env bash
# A method on a real benchmark: scripts/sequence.sh, then the tables of the run.
#
#   bash scripts/benchmark.sh BENCHMARK METHOD [key=value ...]        (BENCHMARK: coin, cl4vqa, ..., or a YAML file)
#
# Environment: as for sequence.sh; MODEL is llava-1.5-7b and OUT is runs/BENCHMARK/METHOD-seedSEED unless given. The
# global batch is in configs/benchmarks; accumulation follows from GPUS, and a number of GPUs that does not divide it is
# an error.
set -euo pipefail
HERE=$(dirname "$0")
if [ $# -lt 2 ]; then
  echo "usage: bash $0 BENCHMARK METHOD [key=value ...]" >&2
  exit 2
fi
BENCHMARK=$1 METHOD=$2
shift 2
export MODEL=${MODEL:-llava-1.5-7b} SEED=${SEED:-0}
name=$(basename "${BENCHMARK%.y*ml}")
export OUT=${OUT:-runs/$name/$(basename "${METHOD%.y*ml}")${ORDER:+-${ORDER//,/-}}-seed$SEED}
{ # bash reads this block whole before the hours of training, so this file may change meanwhile
  bash "$HERE/sequence.sh" "$BENCHMARK" "$METHOD" "$@"
  source "$HERE/common.sh"
  if [ "${NODE_RANK:-0}" = 0 ]; then run clmoe report "$OUT" --format md,csv,tex; fi
  exit
}
