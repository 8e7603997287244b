#!/usr/bin/env bash
# The union of all tasks at once (upper bound) on UCIT. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-multitask}" "$@"
