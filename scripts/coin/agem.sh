#!/usr/bin/env bash
# A-GEM on CoIN. It needs whole gradients, so several processes run under DDP. The environment: scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-agem}" "$@"
