#!/usr/bin/env bash
# ProgLoRA on CL4VQA. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-proglora}" "$@"
