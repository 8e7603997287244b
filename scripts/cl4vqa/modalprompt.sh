#!/usr/bin/env bash
# ModalPrompt on CL4VQA. Environment: see scripts/benchmark.sh.
exec bash "$(dirname "$0")/../benchmark.sh" cl4vqa "${METHOD:-modalprompt}" "$@"
