#!/usr/bin/env bash
# ewc on the embedded benchmark; BENCHMARK=playground-cl4vqa for the other sequence. See scripts/sequence.sh.
# Importance takes a backward pass for each record: 200 of a task's 2,000 stand for all.
exec bash "$(dirname "$0")/../sequence.sh" "${BENCHMARK:-playground-coin}" "${METHOD:-ewc}" options.samples=200 "$@"
