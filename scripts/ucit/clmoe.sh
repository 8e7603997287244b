#!/usr/bin/env bash
# CL-MoE on UCIT. METHOD=clmoe_released takes the released scripts' settings. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-clmoe}" "$@"
