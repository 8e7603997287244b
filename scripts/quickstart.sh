#!/usr/bin/env bash
# From nothing to a table and a page: set up an environment, train lora, clmoe and llava_cmoe on four tasks of the
# embedded benchmark with a short schedule, and report. If you run it again, everything that is finished is skipped.
#
#   bash scripts/quickstart.sh [--full]      --full: all methods, eight tasks, the schedule of docs/results.md
#
# Environment: SEED, OUT (runs/quickstart), JOBS (methods side by side; default: one more than there are cores).
source "$(dirname "$0")/common.sh"
setup ""
# One thread each: two small models side by side are faster than one on two threads. One run more than cores, so that no
# core is idle while the last one ends.
export OMP_NUM_THREADS=1
# The benchmark is drawn while Python starts; the runs wait for it.
clmoe data prepare playground-coin >/dev/null &
exec python scripts/quickstart.py --seed "${SEED:-0}" --jobs "${JOBS:-$(($(cores) + 1))}" ${OUT:+--out "$OUT"} "$@"
