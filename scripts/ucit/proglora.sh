#!/usr/bin/env bash
# ProgLoRA on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-proglora}" "$@"
