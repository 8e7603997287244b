#!/usr/bin/env bash
# Rebuild the pre-trained base of the embedded benchmark and score it: its answers without any training, and with one
# LoRA per task. About an hour on two cores.
#
#   bash scripts/playground/build_base.sh [FOLDER]        (default: runs/base)
#
# The folder holds model, processor, recipe.json and the two score tables; to ship it, replace playground/base with it.
source "$(dirname "$0")/../common.sh"
setup ""
FOLDER=${1:-runs/base}
# One thread, so that the order of additions, and with it every weight, repeats on the same machine.
[ -e "$FOLDER/recipe.json" ] || OMP_NUM_THREADS=1 python scripts/playground/pretrain.py "$FOLDER"
for method in zero_shot separate; do
  MODEL=$FOLDER OUT=$FOLDER.$method bash scripts/playground/$method.sh
  cp "$FOLDER.$method/matrix.csv" "$FOLDER/scores-$method.csv"
done
