#!/usr/bin/env bash
# ProgLoRA on MLLM-DCL. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-proglora}" "$@"
