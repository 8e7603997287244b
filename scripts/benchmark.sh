#!/usr/bin/env bash
# A method on a real benchmark: scripts/sequence.sh, then the tables of the run.
#
#   bash scripts/benchmark.sh BENCHMARK METHOD [key=value ...]        (BENCHMARK: coin, cl4vqa, ..., or a YAML file)
#
# Environment: as for sequence.sh; MODEL is llava-1.5-7b unless given, DATA the benchmark's root (see docs/benchmarks.md;
# default playground/data/BENCHMARK). The global batch is in configs/benchmarks; accumulation follows from GPUS, and a
# number of GPUs that does not divide it is an error.
source "$(dirname "$0")/common.sh"
BENCHMARK=$1 METHOD=$2
shift 2
export MODEL=${MODEL:-llava-1.5-7b} ORDER=${ORDER:-norm} SEED=${SEED:-0}
name=$(basename "${BENCHMARK%.y*ml}")
data=${DATA:-playground/data/$name}
if [ "$name" != "$BENCHMARK" ] && [ -z "${DATA:-}" ]; then data=.; fi # the YAML says where its data is
if [ ! -d "$data" ]; then
  echo "no folder $data: put the files of $BENCHMARK there, or set DATA to their folder (docs/benchmarks.md)" >&2
  exit 2
fi
export OUT=${OUT:-$(run_folder)}
{ # read whole before the hours begin, so that this file may change meanwhile
  bash scripts/sequence.sh "$BENCHMARK" "$METHOD" "$@"
  clmoe report "$OUT" --format md,csv,tex
  exit
}
