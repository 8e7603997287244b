#!/usr/bin/env bash
# SMoLoRA on MLLM-DCL. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-smolora}" "$@"
