#!/usr/bin/env bash
# Every method with three seeds on both sequences of the embedded benchmark; then docs/results.md from all of it.
#
#   bash scripts/playground/table1.sh [key=value ...]
#
# Takes about eight hours on two cores; stop it at any time, and the same line continues. One seed of the eight tasks
# takes 42 minutes: SEEDS=0 BENCHMARKS=playground-coin bash scripts/playground/table1.sh
# Environment: SEEDS (0,1,2), BENCHMARKS, JOBS (runs side by side, one thread each; default: one per core), GRID
# (table1; or the ablations clmoe and llava_cmoe, see configs/grids.yaml), OUT (runs/grid).
source "$(dirname "$0")/../common.sh"
setup ""
export OMP_NUM_THREADS=1
OUT=${OUT:-runs/grid} SEEDS=${SEEDS:-0,1,2} finished=()
for benchmark in ${BENCHMARKS:-playground-coin playground-cl4vqa}; do
  clmoe data prepare "$benchmark"
  python scripts/grid.py "${GRID:-table1}" --benchmark "$benchmark" --seeds "${SEEDS// /,}" --jobs "${JOBS:-$(cores)}" \
    --out "$OUT/$benchmark" "$@"
  finished+=("$OUT/$benchmark"/*-seed*/)
done
python scripts/results.py --add "${finished[@]}"
