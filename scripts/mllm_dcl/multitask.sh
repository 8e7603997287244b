#!/usr/bin/env bash
# The union of all tasks at once (upper bound) on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-multitask}" "$@"
