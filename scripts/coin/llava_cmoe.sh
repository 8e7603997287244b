#!/usr/bin/env bash
# LLaVA-CMoE on CoIN. METHOD chooses another of its configurations, WARMUP the data behind its initial experts (see
# scripts/warmup.sh). Environment: see scripts/benchmark.sh.
set -euo pipefail
source "$(dirname "$0")/../warmup.sh"
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-llava_cmoe}" "${warmup[@]}" "$@"
