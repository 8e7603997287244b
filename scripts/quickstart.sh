#!/usr/bin/env bash
# From nothing to a table: set up an environment, train lora, moelora and clmoe on the embedded eight-task benchmark
# with a reduced schedule, and report. About ten minutes on two cores after the installation; run it again and
# everything that is finished is skipped.
#
# Environment: STEPS per task (the full schedule of scripts/playground/compare.sh is in configs/benchmarks), LIMIT
# test questions in rows before the last, OUT.
source "$(dirname "$0")/common.sh"
setup ""
STEPS=${STEPS:-100} LIMIT=${LIMIT:-100} OUT=${OUT:-runs/quickstart}
echo "Quickstart: playground-coin, 8 tasks, $STEPS steps per task (reduced), first $LIMIT test questions before the last row"
for method in lora moelora clmoe; do
  OUT=$OUT/$method bash scripts/playground/$method.sh training.steps="$STEPS" evaluation.limit="$LIMIT"
done
clmoe report "$OUT"/lora "$OUT"/moelora "$OUT"/clmoe --output "$OUT/report"
