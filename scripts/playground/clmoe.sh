#!/usr/bin/env bash
# clmoe on the embedded benchmark; BENCHMARK=playground-cl4vqa for the other sequence. See scripts/sequence.sh.
# 500 of a task's 2,000 records are enough for its router statistics and its centre.
exec bash "$(dirname "$0")/../sequence.sh" "${BENCHMARK:-playground-coin}" "${METHOD:-clmoe}" options.samples=500 "$@"
