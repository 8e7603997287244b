#!/usr/bin/env bash
# HiDe-LLaVA on CL4VQA. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-hide}" "$@"
