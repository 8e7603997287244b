#!/usr/bin/env bash
# From nothing to a table and a page: set up an environment, train lora, clmoe and llava_cmoe on four tasks of the embedded
# benchmark with a reduced schedule, and report. Run it again and everything that is finished is skipped.
#
# Environment: STEPS per task (reduced; the full schedule is in configs/benchmarks), LIMIT test questions in rows before
# the last, OUT, ORDER (the tasks), METHODS, JOBS methods side by side (default: one per core).
export GPUS=${GPUS:-1} # the runs are side by side, and the model is tiny
source "$(dirname "$0")/common.sh"
setup ""
STEPS=${STEPS:-150} LIMIT=${LIMIT:-100} OUT=${OUT:-runs/quickstart} METHODS=${METHODS:-llava_cmoe clmoe lora}
export ORDER=${ORDER:-sqa,imnet,box,digits}
JOBS=${JOBS:-$(cores)}
echo "Quickstart: playground-coin ($ORDER), $STEPS steps per task (reduced), a sample of $LIMIT test questions in all" \
  "rows but the last; $JOBS methods at a time"
clmoe data prepare playground-coin
# One thread each: two small models side by side are faster than one on two threads. Their bars would overlap.
export OMP_NUM_THREADS=1 CLMOE_PROGRESS=0 OUT STEPS LIMIT
printf '%s\n' $METHODS | xargs -P "$JOBS" -I{} bash -c \
  'OUT=$OUT/{} bash scripts/playground/{}.sh training.steps="$STEPS" evaluation.limit="$LIMIT"'
runs=()
for method in $METHODS; do runs+=("$OUT/$method"); done
clmoe report "${runs[@]}" --format md,csv,html --output "$OUT/report"
echo "Open $OUT/report/report.html in a browser: heat-maps, forgetting curves, routers, and what each method answered."
echo "For clmoe and python in your own shell: source .venv/bin/activate"
