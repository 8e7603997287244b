#!/usr/bin/env bash
# HiDe-LLaVA on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-hide}" "$@"
