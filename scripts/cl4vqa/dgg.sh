#!/usr/bin/env bash
# DGG on CL4VQA. It needs whole gradients, so several processes use DDP. Environment: see scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-dgg}" "$@"
