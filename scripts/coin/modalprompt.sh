#!/usr/bin/env bash
# ModalPrompt on CoIN. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" coin "${METHOD:-modalprompt}" "$@"
