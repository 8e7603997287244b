#!/usr/bin/env bash
# The full comparison on the embedded benchmark: all methods, CL-MoE's two switches, LLaVA-CMoE also with experts so
# small that it starts with the others' parameters (rank 2 each, 16 in total), three seeds.
#
#   bash scripts/playground/compare.sh [key=value ...]
#
# Environment: SEEDS ("0 1 2"), LABELS (rows of the table, default all; clmoe_beta1 needs clmoe), OUT, JOBS runs side by
# side (default: one per core, each with one thread), BENCHMARK. Finished runs are skipped.
export GPUS=${GPUS:-1} # the runs are side by side, and the model is tiny
source "$(dirname "$0")/../common.sh"
setup ""
export BENCHMARK=${BENCHMARK:-playground-coin}
OUT=${OUT:-runs/compare/$BENCHMARK} SEEDS=${SEEDS:-0 1 2} JOBS=${JOBS:-$(nproc)}
LABELS=${LABELS:-zero_shot separate multitask lora moelora clmoe clmoe_beta1 clmoe_no_consolidation llava_cmoe \
llava_cmoe_rank2}
export OUT OMP_NUM_THREADS=1
# All runs are on one base: its features of the prompts are computed once.
export CLMOE_FEATURES=${CLMOE_FEATURES:-$PWD/$OUT/features}

row() { # LABEL SEED [key=value ...]
  local label=$1 seed=$2 method=$1 own=()
  shift 2
  case $label in
  clmoe_no_consolidation) method=clmoe own=(options.consolidation=none) ;;
  llava_cmoe_rank2) method=llava_cmoe own=(adapter.rank=2) ;;
  esac
  SEED=$seed OUT=$OUT/$label-seed$seed bash scripts/playground/"$method".sh label="$label" ${own[@]+"${own[@]}"} "$@"
}
beta1() { # SEED: the checkpoints of clmoe with the instance router alone
  RUN=$OUT/clmoe-seed$1 OUT=$OUT/clmoe_beta1-seed$1 bash scripts/eval.sh "$BENCHMARK" label=clmoe_beta1 options.beta=1
}
export -f row beta1

side_by_side() { xargs -P "$JOBS" -I{} bash -c 'set -euo pipefail; {}'; }

clmoe data prepare "$BENCHMARK"
for seed in $SEEDS; do
  for label in $LABELS; do
    case $label in
    clmoe_beta1) ;; # below: needs the runs of clmoe
    # nothing is trained: one seed is all
    zero_shot) [ "$seed" != "${SEEDS%% *}" ] || echo "row zero_shot $seed $*" ;;
    *) echo "row $label $seed $*" ;;
    esac
  done
done | side_by_side
case " $LABELS " in *" clmoe_beta1 "*) printf 'beta1 %s\n' $SEEDS | side_by_side ;; esac

runs=()
for label in $LABELS; do
  for seed in $SEEDS; do
    if [ "$label" != zero_shot ] || [ "$seed" = "${SEEDS%% *}" ]; then runs+=("$OUT/$label-seed$seed"); fi
  done
done
clmoe report "${runs[@]}" --format md,csv,tex --output "$OUT/report"
