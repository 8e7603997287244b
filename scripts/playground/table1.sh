#!/usr/bin/env bash
# All methods over three seeds on both sequences of the embedded benchmark, and docs/results.md with the two papers'
# kinds of table.
#
#   bash scripts/playground/table1.sh [key=value ...]
#
# About eight hours on two cores; run it in pieces: what is finished is skipped. One seed of the eight tasks takes 42
# minutes: SEEDS=0 BENCHMARKS=playground-coin bash scripts/playground/table1.sh
# Environment: SEEDS ("0 1 2"), BENCHMARKS, JOBS (runs side by side, default: one per core, each with one thread), GRID
# (table1; clmoe and llava_cmoe are the ablations, see configs/grids.yaml), OUT (runs/grid).
export GPUS=${GPUS:-1} # the runs are side by side, and the model is tiny
source "$(dirname "$0")/../common.sh"
setup ""
export OMP_NUM_THREADS=1
OUT=${OUT:-runs/grid} done=()
for benchmark in ${BENCHMARKS:-playground-coin playground-cl4vqa}; do
  clmoe data prepare "$benchmark"
  python scripts/grid.py "${GRID:-table1}" --benchmark "$benchmark" --seeds ${SEEDS:-0 1 2} --jobs "${JOBS:-$(cores)}" \
    --out "$OUT/$benchmark" "$@"
  done+=("$OUT/$benchmark")
done
python scripts/results.py "${done[@]}"
