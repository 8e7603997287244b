#!/usr/bin/env bash
# Sequential LoRA on UCIT. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-lora}" "$@"
