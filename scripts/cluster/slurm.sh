#!/usr/bin/env bash
#SBATCH --job-name=clmoe
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
# One node under SLURM. Options of the site (partition, account) go on sbatch's command line:
#
#   SCRIPT=scripts/coin/llava_cmoe.sh DATA=/data/coin OUT=/runs/coin sbatch -p gpu scripts/cluster/slurm.sh [key=value ...]
#
# Five minutes before the time is up the training is told to stop; it saves its state, and the job queues itself again
# and goes on from there.
set -euo pipefail
for name in SCRIPT DATA OUT; do
  if [ -z "${!name:-}" ]; then
    echo "$name is not set: usage: SCRIPT=scripts/coin/lora.sh DATA=... OUT=... sbatch $0" >&2
    exit 2
  fi
done
cd "${SLURM_SUBMIT_DIR:-.}"
export SCRIPT DATA OUT GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-8}}

set -m # a process group of its own, so that the signal reaches every process of the script
bash "$SCRIPT" "$@" &
group=$!
stopped=""
trap 'stopped=yes; kill -TERM -- "-$group"' TERM
code=0
wait "$group" || code=$?
if [ -n "$stopped" ]; then
  # The shells of the script are gone at once, and its processes still saving: SLURM kills them when this one ends.
  while ps -e -o pgid=,stat= | awk -v group="$group" '$1 == group && $2 !~ /Z/ { n++ } END { exit !n }'; do sleep 1; done
  if [ -n "${SLURM_JOB_ID:-}" ]; then scontrol requeue "$SLURM_JOB_ID"; fi
fi
exit "$code"
