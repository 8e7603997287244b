#!/usr/bin/env bash
# Sequential LoRA on CoIN. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-lora}" "$@"
