#!/usr/bin/env bash
# A-GEM on CL4VQA. It needs whole gradients, so several processes run under DDP. The environment: scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-agem}" "$@"
