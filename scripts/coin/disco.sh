#!/usr/bin/env bash
# DISCO on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-disco}" "$@"
