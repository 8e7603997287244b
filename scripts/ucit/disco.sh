#!/usr/bin/env bash
# DISCO on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-disco}" "$@"
