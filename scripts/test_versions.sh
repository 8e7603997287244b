#!/usr/bin/env bash
# The contract suite (the model, every method, training, loading a base and foreign weights) on the oldest or the newest
# packages that clmoe works with.
#
#   bash scripts/test_versions.sh lowest|highest|installed [--install | pytest arguments]
#
# The first two sets are in configs/versions. Each is installed once, under ENVIRONMENTS (~/.cache/clmoe); PyPI has
# these torches only with CUDA: 6 GB. TORCH_INDEX_URL and PYTHON work as for the other scripts. `installed` uses what is
# there. With --install, nothing is tested. Exit code 3: the set cannot be installed here.
source "$(dirname "$0")/common.sh"
name=${1:-}
case $name in
lowest | highest)
  environment=${ENVIRONMENTS:-~/.cache/clmoe}/$name
  mkdir -p "${environment%/*}"
  if [ ! -e "$environment" ] && [ "$(df --output=avail -k "${environment%/*}" | tail -n 1)" -lt 12000000 ]; then
    echo "test_versions.sh: ${environment%/*} has less than 12 GB free" >&2
    exit 3
  fi
  export PIP_NO_CACHE_DIR=1 # the environment is what is kept
  setup test "$environment" "configs/versions/$name.txt"
  PATH="$environment/bin:$PATH"
  ;;
installed) ;;
*)
  echo "test_versions.sh: choose lowest, highest or installed" >&2
  exit 2
  ;;
esac
shift
if [ "${1:-}" = --install ]; then exit; fi
cd "$ROOT"
export PYTHONPATH="$ROOT" # an environment that is kept may have been made from another checkout
export OMP_NUM_THREADS=1  # a thread for each of pytest's processes
# Code 3 is also pytest's for an internal error.
suite() { python -m pytest -n "$(($(cores) + 1))" --maxprocesses 8 --dist worksteal "$@" || exit 1; }
suite -m "not slow" tests/experts tests/methods/test_contract.py tests/train tests/bases tests/convert \
  tests/data/test_formats.py tests/data/test_prompts.py tests/test_export.py "$@"
# What is slow but differs between versions; for the families, one method, and that a killed training continues.
suite -m slow -k "not inductor and not finds_the_tasks and not adapted_ffn and (clmoe or not two_tasks)" \
  tests/experts/test_compile.py tests/test_export.py tests/bases/test_families.py "$@"
