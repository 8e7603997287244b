#!/usr/bin/env bash
# MR-LoRA on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-mrlora}" "$@"
