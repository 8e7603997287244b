#!/usr/bin/env bash
# DGG on UCIT. It needs whole gradients, so several processes run under DDP. The environment: scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-dgg}" "$@"
