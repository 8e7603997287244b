#!/usr/bin/env bash
# Measure a true-size LLaVA-1.5-7B with random weights on one 80 GB card, in at most nine minutes.
#
#   bash scripts/gpu_kit.sh            (OUT=folder for the figures, one JSON per part; default runs/gpu-kit)
#   bash scripts/gpu_kit.sh --smoke    (every part at tiny sizes on a CPU, and the table filled from it)
#
# Afterwards, python scripts/bench/kit.py fill OUT writes the figures into docs/performance.md. It needs no network,
# files or installation: only torch, transformers and peft, as in a CUDA image; PYTHON chooses another interpreter.
set -euo pipefail
HERE=$(cd "$(dirname "$0")" && pwd)
kit() { "${PYTHON:-python3}" "$HERE/bench/kit.py" "$@"; }
export OUT=${OUT:-runs/gpu-kit} HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
if [ "${1:-}" = --smoke ]; then
  export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  folder=$(mktemp -d)
  trap 'rm -r "$folder"' EXIT
  kit run "$folder" a b c d e f g h --smoke
  kit check "$folder"
  cp "$HERE/../docs/performance.md" "$folder/page.md"
  kit fill "$folder" "$folder/page.md"
  if sed -n '/<!-- gpu kit/,/<!-- end of gpu kit/p' "$folder/page.md" | grep 'not measured'; then exit 1; fi
  exit
fi
# part:seconds, 535 in all; the most important comes first
for part in b:140 a:100 c:20 g:85 d:70 e:45 h:30 f:45; do
  timeout -k 5 "${part#*:}" "${PYTHON:-python3}" "$HERE/bench/kit.py" run "$OUT" "${part%:*}" || true
done
kit check "$OUT"
