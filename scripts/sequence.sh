#!/usr/bin/env bash
# The one loop over tasks: train a method on a benchmark's sequence and evaluate after each task.
#
#   bash scripts/sequence.sh BENCHMARK METHOD [key=value ...]
#
# Environment: SEED (0), ORDER (norm, rev, rand or names with commas), OUT (run folder), MODEL (a model
# configuration or folder), DATA (the benchmark's files), GPUS (all), LAUNCHER (python, torchrun, deepspeed), DEEPSPEED
# (zero2, zero2_offload, zero3 or a JSON file), HOSTFILE. A method's own script takes METHOD, another configuration of
# it (configs/methods, or a YAML file). What is finished is skipped: run the same line again after any interruption, with
# as many GPUs as there are then.
source "$(dirname "$0")/common.sh"
BENCHMARK=$1 METHOD=$2
shift 2
SEED=${SEED:-0} ORDER=${ORDER:-norm}
OUT=${OUT:-$(run_folder)}

where=(--benchmark "$BENCHMARK" --order "$ORDER" ${DATA:+--data "$DATA"})
how=(--config "$METHOD" ${MODEL:+--model "$MODEL"})
steps=$(clmoe plan "${how[@]}" "${where[@]}" --steps "seed=$SEED" "$@")

if [ -z "$steps" ]; then
  launch eval --checkpoint base "${how[@]}" "${where[@]}" --output "$OUT" "seed=$SEED" "$@"
  exit
fi
previous=""
while read -r number task parent; do
  [ "$parent" != - ] || previous=""
  output=$OUT/${number}_$task
  launch train "${how[@]}" "${where[@]}" --task "$task" ${previous:+--previous "$previous"} --output "$output" \
    --then-eval ${DEEPSPEED:+--deepspeed "$DEEPSPEED"} "seed=$SEED" "$@" </dev/null
  previous=$output
done <<<"$steps"
