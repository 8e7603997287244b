#!/usr/bin/env bash
# KeepLoRA on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-keeplora}" "$@"
