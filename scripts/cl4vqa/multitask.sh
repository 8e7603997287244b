#!/usr/bin/env bash
# The union of all tasks at once (upper bound) on CL4VQA. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-multitask}" "$@"
