#!/usr/bin/env bash
# LLaVA-1.5 at its true width with two of its layers and random weights, on a CPU with 8 GiB free: what a step holds in
# memory against the plan, then two tasks of each method from end to end (train, seal, resume, grow, locate, evaluate).
#
#   bash scripts/rehearse.sh [METHOD ...]        (MODEL=llava-1.5-13b LAYERS=1 OUT=runs/rehearsal)
set -euo pipefail
source "$(dirname "$0")/common.sh"
OUT=${OUT:-runs/rehearsal} MODEL=${MODEL:-llava-1.5-7b} LAYERS=${LAYERS:-2}
if [ $# -eq 0 ]; then set -- lora olora moelora clmoe clmoe_released llava_cmoe; fi
python -W ignore "$ROOT/scripts/bench/rehearse.py" memory --model "$MODEL" --layers "$LAYERS" $((LAYERS + 1)) --methods "$@"
base="$OUT/$MODEL-$LAYERS"
if [ ! -e "$base/benchmark.yaml" ]; then
  python -W ignore "$ROOT/scripts/bench/rehearse.py" make "$base" --model "$MODEL" --layers "$LAYERS"
fi
for method in "$@"; do
  options=(training.steps=1 training.batch_size=1 model.dtype=bfloat16 evaluation.batch_size=4 evaluation.limit=4)
  if [ "$method" = llava_cmoe ]; then
    options+=(options.extend=every options.probe_min_steps=1 locator.options.steps=10)
  fi
  start=$SECONDS
  launch run "$method" "$base/benchmark.yaml" --model "$base/base" --output "$OUT/$method" "${options[@]}"
  echo "$method: two tasks in $((SECONDS - start)) s"
done
