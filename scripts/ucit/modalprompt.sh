#!/usr/bin/env bash
# ModalPrompt on UCIT. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" ucit "${METHOD:-modalprompt}" "$@"
