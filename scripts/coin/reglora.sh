#!/usr/bin/env bash
# SEFE's RegLoRA on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-reglora}" "$@"
