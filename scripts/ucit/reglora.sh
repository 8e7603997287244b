#!/usr/bin/env bash
# SEFE's RegLoRA on UCIT. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-reglora}" "$@"
