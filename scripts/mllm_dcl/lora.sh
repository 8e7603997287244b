#!/usr/bin/env bash
# Sequential LoRA on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-lora}" "$@"
