# Sourced by the other scripts: repository root, Python environment, threads.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
if [ -x .venv/bin/clmoe ]; then PATH="$ROOT/.venv/bin:$PATH"; fi
# Sums are split over threads, so equal bytes need an equal number of them.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export TOKENIZERS_PARALLELISM=false

# Processes per machine and what starts them; see docs/multi-gpu.md.
if [ -z "${GPUS:-}" ]; then GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l); fi
if [ "$GPUS" -lt 1 ]; then GPUS=1; fi
if [ -z "${LAUNCHER:-}" ]; then if [ "$GPUS" -gt 1 ]; then LAUNCHER=deepspeed; else LAUNCHER=python; fi; fi
if [ "$LAUNCHER" = deepspeed ]; then DEEPSPEED=${DEEPSPEED:-zero2}; fi

# launch VERB ...: `clmoe VERB ...` in GPUS processes.
launch() {
  case $LAUNCHER in
  python) clmoe "$@" ;;
  torchrun) python -m torch.distributed.run --standalone --nproc_per_node "$GPUS" -m clmoe.cli "$@" ;;
  deepspeed)
    deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} --num_gpus "$GPUS" --no_local_rank --log_level warning \
      --module clmoe.cli "$@"
    ;;
  *)
    echo "LAUNCHER=$LAUNCHER is none of python, torchrun, deepspeed" >&2
    exit 2
    ;;
  esac
}

# setup EXTRAS: make .venv and install the pinned packages, once per state of pyproject.toml and constraints.txt.
# PYTHON chooses the interpreter; TORCH_INDEX_URL an index to take torch from (PyTorch's CPU index, say).
setup() {
  local extras=$1 python="" stamp
  stamp=".venv/installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-${extras:-base}"
  if [ -e "$stamp" ]; then return; fi
  for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "clmoe needs Python 3.11 or 3.12; none found (set PYTHON=/path/to/python)" >&2
    exit 2
  fi
  echo "Setting up .venv with $("$python" --version) (about two minutes)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --constraint constraints.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
    torch==2.13.0
  # naming torch again keeps the build that is installed
  .venv/bin/python -m pip install --quiet --constraint constraints.txt torch==2.13.0 --editable ".${extras:+[$extras]}"
  PATH="$ROOT/.venv/bin:$PATH"
  touch "$stamp"
}
