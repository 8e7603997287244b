#!/usr/bin/env bash
# The full comparison on the embedded benchmark: all methods, CL-MoE's two switches, LLaVA-CMoE also with experts so
# small that it starts with the others' parameters (rank 2 each, 16 in total), three seeds.
#
#   bash scripts/playground/compare.sh [key=value ...]
#
# Environment: SEEDS ("0 1 2"), OUT, JOBS runs side by side (default: one per core, each with one thread),
# BENCHMARK. Finished runs are skipped.
source "$(dirname "$0")/../common.sh"
setup ""
export BENCHMARK=${BENCHMARK:-playground-coin}
OUT=${OUT:-runs/compare/$BENCHMARK} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-$(nproc)}
export OMP_NUM_THREADS=1
# All runs are on one base: its features of the prompts are computed once.
export CLMOE_FEATURES=${CLMOE_FEATURES:-$PWD/$OUT/features}

one() { # SEED LABEL METHOD [key=value ...]
  local seed=$1 label=$2 method=$3
  shift 3
  SEED=$seed OUT=$OUT/$label-seed$seed bash scripts/playground/"$method".sh label="$label" "$@"
}
variant() { # SEED LABEL [key=value ...]: the checkpoints of clmoe under other evaluation settings
  local seed=$1 label=$2
  shift 2
  RUN=$OUT/clmoe-seed$seed OUT=$OUT/$label-seed$seed bash scripts/eval.sh "$BENCHMARK" label="$label" "$@"
}
clmoe_and_variants() {
  one "$1" clmoe clmoe "${@:2}"
  variant "$1" clmoe_beta1 options.beta=1
}
export -f one variant clmoe_and_variants
export OUT

clmoe data prepare "$BENCHMARK"
for seed in $SEEDS; do
  echo "clmoe_and_variants $seed $*"
  echo "one $seed llava_cmoe llava_cmoe $*"
  echo "one $seed clmoe_no_consolidation clmoe options.consolidation=none $*"
  for method in lora moelora separate multitask; do
    echo "one $seed $method $method $*"
  done
  echo "one $seed llava_cmoe_rank2 llava_cmoe adapter.rank=2 $*"
  # nothing is trained: no seed has a part in it
  if [ "$seed" = "${SEEDS%% *}" ]; then echo "one $seed zero_shot zero_shot $*"; fi
done | xargs -P "$JOBS" -I{} bash -c 'set -euo pipefail; {}'

runs=()
for label in zero_shot separate multitask lora moelora clmoe clmoe_beta1 clmoe_no_consolidation llava_cmoe \
  llava_cmoe_rank2; do
  for seed in $SEEDS; do
    if [ "$label" != zero_shot ] || [ "$seed" = "${SEEDS%% *}" ]; then runs+=("$OUT/$label-seed$seed"); fi
  done
done
clmoe report "${runs[@]}" --format md,csv,tex --output "$OUT/report"
