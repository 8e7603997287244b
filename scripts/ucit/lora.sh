#!/usr/bin/env bash
# Sequential LoRA on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-lora}" "$@"
