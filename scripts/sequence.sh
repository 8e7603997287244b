#!/usr/bin/env bash
# A method on a whole benchmark: `clmoe run` through python, torchrun or deepspeed.
#
#   bash scripts/sequence.sh BENCHMARK METHOD [key=value ...]
#
# Environment: SEED (0), ORDER (norm, rev, rand or names with commas), OUT (run folder), MODEL (a model configuration or
# folder), DATA (the benchmark's files), GPUS (all), LAUNCHER (python, torchrun, deepspeed), DEEPSPEED (zero2,
# zero2_offload or a JSON file), HOSTFILE, NODES; DRY_RUN=1 prints the commands instead of running them. A method's own
# script takes METHOD, another configuration of it (configs/methods, or a YAML file). Run the same line again after any
# interruption, with however many GPUs there are then.
source "$(dirname "$0")/common.sh"
if [ $# -lt 2 ]; then
  echo "usage: bash $0 BENCHMARK METHOD [key=value ...]" >&2
  exit 2
fi
BENCHMARK=$1 METHOD=$2
shift 2
launch run "$METHOD" "$BENCHMARK" --seed "${SEED:-0}" --order "${ORDER:-norm}" ${OUT:+--output "$OUT"} \
  ${MODEL:+--base "$MODEL"} ${DATA:+--data "$DATA"} ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "$@"
