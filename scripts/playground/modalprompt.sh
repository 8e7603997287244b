#!/usr/bin/env bash
# modalprompt on the embedded benchmark; BENCHMARK=playground-cl4vqa for the other sequence. See scripts/sequence.sh.
exec bash "$(dirname "$0")/../sequence.sh" "${BENCHMARK:-playground-coin}" "${METHOD:-modalprompt}" "$@"
