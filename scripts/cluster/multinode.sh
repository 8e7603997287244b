#!/usr/bin/env bash
# Several machines, with DeepSpeed over ssh: run this on the first of them, in a checkout that all of them share.
#
#   HOSTS="node1 node2" GPUS=8 SCRIPT=scripts/coin/clmoe.sh DATA=/data/coin OUT=/runs/coin \
#     bash scripts/cluster/multinode.sh [key=value ...]
#
# Needs pdsh, through which DeepSpeed reaches the machines.
# HOSTS: machines that ssh reaches without a password (under SLURM: those of the job). GPUS: of each machine; GPUS times
# the machines has to divide the global batch. HOSTFILE, if set, is an existing list of machines. OUT and DATA must be
# on a file system that all machines share. DRY_RUN=1 prints the list and the commands, and writes nothing.
set -euo pipefail
for name in SCRIPT DATA OUT GPUS; do
  if [ -z "${!name:-}" ]; then
    echo "$name is not set: usage: HOSTS=\"node1 node2\" GPUS=8 SCRIPT=scripts/coin/lora.sh DATA=... OUT=... bash $0" >&2
    exit 2
  fi
done
if [ -z "${HOSTFILE:-}" ]; then
  if [ -z "${HOSTS:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then HOSTS=$(scontrol show hostnames "$SLURM_JOB_NODELIST"); fi
  if [ -z "${HOSTS:-}" ]; then
    echo "HOSTS is not set: give the machines' names, or HOSTFILE, the path of DeepSpeed's list of them" >&2
    exit 2
  fi
  HOSTFILE=$OUT/hostfile
  list=$(for host in $HOSTS; do echo "$host slots=$GPUS"; done)
  if [ -n "${DRY_RUN:-}" ]; then
    printf '# %s:\n%s\n' "$HOSTFILE" "$list"
  else
    mkdir -p "$OUT"
    echo "$list" >"$HOSTFILE"
  fi
fi
export HOSTFILE GPUS DATA OUT LAUNCHER=deepspeed
exec bash "$SCRIPT" "$@"
