#!/usr/bin/env bash
# MR-LoRA on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-mrlora}" "$@"
