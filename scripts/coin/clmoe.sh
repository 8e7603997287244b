#!/usr/bin/env bash
# CL-MoE on CoIN. METHOD=clmoe_released uses the released scripts' settings. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-clmoe}" "$@"
