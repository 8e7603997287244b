#!/usr/bin/env bash
# HiDe-LLaVA on UCIT. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-hide}" "$@"
