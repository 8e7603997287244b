#!/usr/bin/env bash
# SAME on MLLM-DCL. It needs whole gradients, so several processes use DDP. Environment: see scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-same}" "$@"
