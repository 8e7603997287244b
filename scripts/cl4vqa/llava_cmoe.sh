#!/usr/bin/env bash
# LLaVA-CMoE on CL4VQA. METHOD chooses another of its configurations, WARMUP the data behind its initial experts (see
# scripts/warmup.sh). Environment: see scripts/benchmark.sh.
set -euo pipefail
source "$(dirname "$0")/../warmup.sh"
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-llava_cmoe}" "${warmup[@]}" "$@"
