#!/usr/bin/env bash
#SBATCH --job-name=clmoe
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One or more nodes under SLURM. Your site's options (partition, account) go on sbatch's command line:
#
#   SCRIPT=scripts/coin/llava_cmoe.sh DATA=/data/coin OUT=/runs/coin sbatch -p gpu scripts/cluster/slurm.sh [key=value ...]
#   ... sbatch -p gpu --nodes=2 scripts/cluster/slurm.sh                  (torchrun on each node; DEEPSPEED=zero2 works too)
#   ... DRY_RUN=1 NODES=2 bash scripts/cluster/slurm.sh                   (prints the commands)
#
# Five minutes before the time is up, the training is told to stop; it saves its state, and the job queues itself again
# and continues from there. If a process of several nodes dies, srun ends the others. All nodes must share OUT and DATA.
set -euo pipefail
for name in SCRIPT DATA OUT; do
  if [ -z "${!name:-}" ]; then
    echo "$name is not set: usage: SCRIPT=scripts/coin/lora.sh DATA=... OUT=... sbatch $0" >&2
    exit 2
  fi
done
cd "${SLURM_SUBMIT_DIR:-.}"
export SCRIPT DATA OUT GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}} NODES=${NODES:-${SLURM_JOB_NUM_NODES:-1}}

line=(bash "$SCRIPT" "$@")
if [ "$NODES" -gt 1 ]; then
  if [ -z "${DRY_RUN:-}" ]; then MASTER_ADDR=${MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}; fi
  export MASTER_ADDR=${MASTER_ADDR:-FIRST_NODE} MASTER_PORT=${MASTER_PORT:-$((20000 + ${SLURM_JOB_ID:-0} % 20000))}
  # Shells would end at SIGTERM before the processes that save; clmoe and torchrun have their own handlers.
  node='trap "" TERM; NODE_RANK=$SLURM_NODEID exec bash "$@"'
  srun=(srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-64}")
  line=("${srun[@]}" bash -c "$node" node "$SCRIPT" "$@")
fi
if [ -n "${DRY_RUN:-}" ]; then
  if [ "$NODES" -gt 1 ]; then echo "${srun[*]} bash -c '$node' node $SCRIPT $*"; fi
  for ((rank = 0; rank < NODES; rank++)); do
    echo "# node $rank"
    NODE_RANK=$rank bash "$SCRIPT" "$@"
  done
  exit
fi

set -m # a process group of its own, so that the signal reaches every process of the script
"${line[@]}" &
group=$!
stopped=""
stop() {
  stopped=yes
  # srun itself would answer SIGTERM by killing its tasks
  if [ "$NODES" -gt 1 ]; then scancel --signal=TERM "$SLURM_JOB_ID"; else kill -TERM -- "-$group"; fi
}
trap stop TERM
code=0
wait "$group" || code=$?
if [ -n "$stopped" ]; then
  # The script's shells end at once while its processes are still saving; SLURM kills those when this shell ends.
  while ps -e -o pgid=,stat= | awk -v group="$group" '$1 == group && $2 !~ /Z/ { n++ } END { exit !n }'; do sleep 1; done
  if [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
