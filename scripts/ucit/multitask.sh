#!/usr/bin/env bash
# The union of all tasks at once (upper bound) on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-multitask}" "$@"
