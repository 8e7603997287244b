#!/usr/bin/env bash
# LLaCA on UCIT. It needs whole gradients, so several processes use DDP. Environment: see scripts/benchmark.sh.
export LAUNCHER=${LAUNCHER:-torchrun}
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-llaca}" "$@"
