#!/usr/bin/env bash
# CL-MoE on MLLM-DCL. METHOD=clmoe_released uses the released scripts' settings. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-clmoe}" "$@"
