#!/usr/bin/env bash
# SEFE's RegLoRA on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-reglora}" "$@"
