#!/usr/bin/env bash
# ModalPrompt on MLLM-DCL. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" mllm_dcl "${METHOD:-modalprompt}" "$@"
