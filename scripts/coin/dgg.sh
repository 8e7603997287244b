#!/usr/bin/env bash
# DGG on CoIN. It needs whole gradients, so several processes use DDP. Environment: see scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-dgg}" "$@"
