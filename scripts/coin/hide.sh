#!/usr/bin/env bash
# HiDe-LLaVA on CoIN. The environment: scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-hide}" "$@"
