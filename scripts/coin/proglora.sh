#!/usr/bin/env bash
# ProgLoRA on CoIN. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-proglora}" "$@"
