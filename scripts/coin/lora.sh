#!/usr/bin/env bash
# Sequential LoRA on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-lora}" "$@"
