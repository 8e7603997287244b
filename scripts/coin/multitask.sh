#!/usr/bin/env bash
# The union of all tasks at once (upper bound) on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-multitask}" "$@"
