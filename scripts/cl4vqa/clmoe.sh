#!/usr/bin/env bash
# CL-MoE on CL4VQA. METHOD=clmoe_released uses the released scripts' settings. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-clmoe}" "$@"
