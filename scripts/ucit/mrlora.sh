#!/usr/bin/env bash
# MR-LoRA on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-mrlora}" "$@"
