#!/usr/bin/env bash
# Evaluate every checkpoint of a finished run under other evaluation settings, into a run folder of its own.
#
#   RUN=runs/x OUT=runs/x-oracle bash scripts/eval.sh BENCHMARK [key=value ...]
#
# For instance locator=oracle, or options.beta=1 label=clmoe_beta1. Environment: ORDER, DATA, GPUS, LAUNCHER as for
# sequence.sh.
source "$(dirname "$0")/common.sh"
if [ $# -lt 1 ] || [ -z "${RUN:-}" ] || [ -z "${OUT:-}" ]; then
  echo "usage: RUN=runs/x OUT=runs/x-oracle bash $0 BENCHMARK [key=value ...]" >&2
  exit 2
fi
BENCHMARK=$1
shift
for checkpoint in "$RUN"/[0-9]*_*/; do
  launch eval --checkpoint "${checkpoint%/}" --benchmark "$BENCHMARK" --order "${ORDER:-norm}" ${DATA:+--data "$DATA"} \
    --output "$OUT" "$@" </dev/null
done
