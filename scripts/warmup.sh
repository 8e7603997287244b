# Sourced by the llava_cmoe scripts of the real benchmarks: where the initial experts come from.
#
# WARMUP is a folder with train.json (LLaVA format, disjoint from the sequence) and images/. Without it the first task
# trains the initial experts, and is not probed.
warmup=(options.initial_experts_from=first_task)
if [ -n "${WARMUP:-}" ]; then
  for path in "$WARMUP/train.json" "$WARMUP/images"; do
    if [ ! -e "$path" ]; then
      echo "WARMUP=$WARMUP: no $path" >&2
      exit 2
    fi
  done
  WARMUP=$(cd "$WARMUP" && pwd)
  warmup=(options.initial_experts_from=warmup "options.warmup_train=$WARMUP/train.json"
    "options.warmup_images=$WARMUP/images")
else
  echo "WARMUP is not set: the first task trains the initial experts (options.initial_experts_from=first_task)" >&2
fi
