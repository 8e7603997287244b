#!/usr/bin/env bash
# LLaVA-1.5 at its true width with one or two of its layers and random weights, on a CPU with 8 GiB free: what a step
# holds in memory against the plan, then two tasks of each method from end to end (train, seal, continue, grow, locate,
# evaluate), without and with activation checkpointing. If you run it again, it continues where it was stopped.
#
#   bash scripts/rehearse.sh [METHOD ...]    (MODEL=llava-1.5-13b: that width alone; DTYPE=float32; OUT=runs/rehearsal)
set -euo pipefail
source "$(dirname "$0")/common.sh"
OUT=${OUT:-runs/rehearsal}
if [ $# -eq 0 ]; then set -- lora olora moelora clmoe clmoe_released llava_cmoe; fi
rehearse() { python -W ignore "$ROOT/scripts/bench/rehearse.py" "$@"; }
for model in ${MODEL:-llava-1.5-7b llava-1.5-13b}; do
  layers=2
  if [ "$model" = llava-1.5-13b ]; then layers=1; fi
  rehearse memory --model "$model" --layers 2 3 --methods "$@" # the first layer may need no gradient: no line through it
  base="$OUT/$model-$layers"
  if [ ! -e "$base/benchmark.yaml" ]; then rehearse make "$base" --model "$model" --layers "$layers"; fi
  rehearse run "$base" "$base-runs" --methods "$@" --dtype "${DTYPE:-bfloat16}"
done
