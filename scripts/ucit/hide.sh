#!/usr/bin/env bash
# HiDe-LLaVA on UCIT. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-hide}" "$@"
