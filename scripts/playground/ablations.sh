#!/usr/bin/env bash
# LLaVA-CMoE's ablations on the embedded benchmark (the paper's Tables 2, 4 and 5, orders, ranks), one table.
#
#   bash scripts/playground/ablations.sh [key=value ...]
#
# One of them alone: METHOD=llava_cmoe_every_block bash scripts/playground/llava_cmoe.sh
# Environment: SEEDS ("0"), OUT (that of compare.sh, whose llava_cmoe runs are taken), JOBS, BENCHMARK.
export GPUS=${GPUS:-1} # the runs are side by side, and the model is tiny
source "$(dirname "$0")/../common.sh"
setup ""
export BENCHMARK=${BENCHMARK:-playground-coin}
OUT=${OUT:-runs/compare/$BENCHMARK} SEEDS=${SEEDS:-0} JOBS=${JOBS:-$(nproc)}
export OUT OMP_NUM_THREADS=1
export CLMOE_FEATURES=${CLMOE_FEATURES:-$PWD/$OUT/features}

CONFIGS="no_extension random_blocks every_block probes4 probes8 pooled"
ROUTERS="last random oracle"
ORDERS="rev rand"
RANKS="4 8"

config() { # SEED NAME [key=value ...]
  SEED=$1 METHOD=llava_cmoe_$2 OUT=$OUT/llava_cmoe_$2-seed$1 bash scripts/playground/llava_cmoe.sh "${@:3}"
}
order() { # SEED ORDER
  SEED=$1 ORDER=$2 OUT=$OUT/llava_cmoe_order_$2-seed$1 bash scripts/playground/llava_cmoe.sh \
    label="llava_cmoe_order_$2" "${@:3}"
}
rank() { # SEED RANK (of each expert; 16 is the table's llava_cmoe)
  SEED=$1 OUT=$OUT/llava_cmoe_rank$2-seed$1 bash scripts/playground/llava_cmoe.sh label="llava_cmoe_rank$2" \
    adapter.rank="$2" "${@:3}"
}
first_task() { # SEED: no warm-up data
  SEED=$1 WARMUP="" OUT=$OUT/llava_cmoe_first_task-seed$1 bash scripts/playground/llava_cmoe.sh \
    label=llava_cmoe_first_task "${@:2}"
}
full() { # SEED: the method itself, and its checkpoints under other routers and the other decider
  local run=$OUT/llava_cmoe-seed$1 router
  SEED=$1 OUT=$run bash scripts/playground/llava_cmoe.sh label=llava_cmoe "${@:2}"
  for router in $ROUTERS; do
    RUN=$run OUT=$OUT/llava_cmoe_router_$router-seed$1 bash scripts/eval.sh "$BENCHMARK" --router "$router" \
      label="llava_cmoe_router_$router"
  done
  RUN=$run OUT=$OUT/llava_cmoe_nearest_mean-seed$1 bash scripts/eval.sh "$BENCHMARK" options.decider=prototype \
    label=llava_cmoe_nearest_mean
}
export -f config order rank first_task full
export ROUTERS

clmoe data prepare "$BENCHMARK"
for seed in $SEEDS; do
  echo "full $seed $*"
  for name in $CONFIGS; do echo "config $seed $name $*"; done
  echo "first_task $seed $*"
  for name in $ORDERS; do echo "order $seed $name $*"; done
  for name in $RANKS; do echo "rank $seed $name $*"; done
done | xargs -P "$JOBS" -I{} bash -c 'set -euo pipefail; {}'

runs=()
for label in llava_cmoe $(printf 'llava_cmoe_%s ' $CONFIGS) llava_cmoe_first_task llava_cmoe_nearest_mean \
  $(printf 'llava_cmoe_router_%s ' $ROUTERS) $(printf 'llava_cmoe_order_%s ' $ORDERS) \
  $(printf 'llava_cmoe_rank%s ' $RANKS); do
  for seed in $SEEDS; do runs+=("$OUT/$label-seed$seed"); done
done
clmoe report "${runs[@]}" --format md,csv,tex --output "$OUT/ablations"
