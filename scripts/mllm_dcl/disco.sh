#!/usr/bin/env bash
# DISCO on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-disco}" "$@"
