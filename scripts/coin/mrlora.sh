#!/usr/bin/env bash
# MR-LoRA on CoIN. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-mrlora}" "$@"
