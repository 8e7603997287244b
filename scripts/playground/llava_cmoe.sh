#!/usr/bin/env bash
# llava_cmoe on the embedded benchmark; BENCHMARK=playground-cl4vqa for the other sequence. See scripts/sequence.sh.
#
# METHOD names another configuration of it (configs/methods/llava_cmoe_*.yaml), WARMUP the folder with train.json and
# images/ behind the initial experts (default: the benchmark's neutral mixture). 500 of a task's 2,000 records are
# enough for its VAE.
source "$(dirname "$0")/../common.sh"
BENCHMARK=${BENCHMARK:-playground-coin}
WARMUP=${WARMUP:-${DATA:-playground/data/$BENCHMARK}/warmup}
clmoe data prepare "$BENCHMARK" ${DATA:+--data "$DATA"} >/dev/null
exec bash scripts/sequence.sh "$BENCHMARK" "${METHOD:-llava_cmoe}" options.initial_experts_from=warmup \
  options.warmup_train="$WARMUP/train.json" options.warmup_images="$WARMUP/images" options.samples=500 "$@"
