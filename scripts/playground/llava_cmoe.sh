#!/usr/bin/env bash
# llava_cmoe on the embedded benchmark; BENCHMARK=playground-cl4vqa for the other sequence. See scripts/sequence.sh.
#
# METHOD names another configuration of it (configs/methods/llava_cmoe_*.yaml). WARMUP is the folder with train.json and
# images/ behind the initial experts (default: the benchmark's neutral mixture); with WARMUP= (empty) they come from the
# first task. VAEs half as wide as the default and with half the draws fit in less than half the time on a CPU.
source "$(dirname "$0")/../common.sh"
BENCHMARK=${BENCHMARK:-playground-coin}
WARMUP=${WARMUP-${DATA:-playground/data/$BENCHMARK}/warmup}
warmup=()
if [ -n "$WARMUP" ]; then
  clmoe data prepare "$BENCHMARK" ${DATA:+--data "$DATA"} >/dev/null
  warmup=(options.initial_experts_from=warmup options.warmup_train="$WARMUP/train.json"
    options.warmup_images="$WARMUP/images")
fi
exec bash scripts/sequence.sh "$BENCHMARK" "${METHOD:-llava_cmoe}" options.locator.hidden=256 options.locator.draws=4 \
  ${warmup[@]+"${warmup[@]}"} "$@"
