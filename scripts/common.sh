# Sourced by the other scripts: Python environment, threads, and how processes are started. Paths that users give are
# relative to the folder in which they call a script.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -x "$ROOT/.venv/bin/clmoe" ]; then PATH="$ROOT/.venv/bin:$PATH"; fi
# Sums are split over threads, so equal bytes need the same number of threads.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
export TOKENIZERS_PARALLELISM=false

# Processes per machine, and what starts them; see docs/multi-gpu.md.
VISIBLE=$(tr ',' '\n' <<<"${CUDA_VISIBLE_DEVICES:-}" | grep -c . || true)
if [ -z "${GPUS:-}" ]; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
    GPUS=$VISIBLE
  else
    GPUS=$({ nvidia-smi --list-gpus 2>/dev/null || true; } | wc -l)
  fi
fi
if [ "$GPUS" -lt 1 ]; then GPUS=1; fi
if [ "$VISIBLE" -gt 0 ] && [ "$GPUS" -gt "$VISIBLE" ]; then
  echo "GPUS=$GPUS, but CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES names $VISIBLE" >&2
  exit 2
fi
# Several machines, each starting the same script (NODES, NODE_RANK 0 to NODES - 1, MASTER_ADDR, MASTER_PORT).
NODES=${NODES:-1}
if [ "$NODES" -gt 1 ]; then
  for name in NODE_RANK MASTER_ADDR MASTER_PORT; do
    if [ -z "${!name:-}" ]; then
      echo "NODES=$NODES, but $name is not set (docs/multi-gpu.md)" >&2
      exit 2
    fi
  done
  LAUNCHER=${LAUNCHER:-torchrun}
fi
if [ -z "${LAUNCHER:-}" ]; then if [ "$GPUS" -gt 1 ]; then LAUNCHER=deepspeed; else LAUNCHER=python; fi; fi
if [ "$LAUNCHER" = deepspeed ]; then DEEPSPEED=${DEEPSPEED:-zero2}; fi

# Variables that processes on other machines need; DeepSpeed passes on few besides those in DS_ENV_FILE.
HANDED_OVER='^(CLMOE_[A-Z_]+|HF_HOME|HF_HUB_CACHE|HF_HUB_OFFLINE|OMP_NUM_THREADS|TOKENIZERS_PARALLELISM|WANDB_MODE)='

# run COMMAND ...: run the command, or with DRY_RUN=1 only print its line.
run() {
  local word shown=()
  if [ -z "${DRY_RUN:-}" ]; then
    "$@"
    return
  fi
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:,=@%+-]+$ ]]; then shown+=("$word"); else shown+=("${word@Q}"); fi
  done
  echo "${shown[*]}"
}

# launch VERB ...: `clmoe VERB ...` in GPUS processes on each machine.
launch() {
  local line=(python -m torch.distributed.run --nproc_per_node "$GPUS")
  case $LAUNCHER in
  python) line=(clmoe) ;;
  torchrun)
    if [ "$NODES" -gt 1 ]; then
      line+=(--nnodes "$NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
    else
      line+=(--standalone)
    fi
    line+=(-m clmoe.cli)
    ;;
  deepspeed)
    line=(deepspeed)
    if [ -n "${HOSTFILE:-}" ]; then
      line+=(--num_gpus "$GPUS" --hostfile "$HOSTFILE") # DeepSpeed then ignores CUDA_VISIBLE_DEVICES
      if [ "$NODES" -gt 1 ]; then
        line+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
      elif [ -z "${DRY_RUN:-}" ]; then
        export DS_ENV_FILE=${DS_ENV_FILE:-$HOSTFILE.env}
        env | grep -E "$HANDED_OVER" >"$DS_ENV_FILE"
      fi
    elif [ "$VISIBLE" -gt 0 ]; then
      line+=(--include "localhost:$(cut -d, -f"1-$GPUS" <<<"$CUDA_VISIBLE_DEVICES")")
    else
      line+=(--num_gpus "$GPUS")
    fi
    line+=(--master_port "${MASTER_PORT:-$(free_port)}" --no_local_rank --log_level warning --module clmoe.cli)
    ;;
  *)
    echo "LAUNCHER=$LAUNCHER is not one of python, torchrun, deepspeed" >&2
    exit 2
    ;;
  esac
  run "${line[@]}" "$@"
}

# How many cores there are. nproc itself answers with OMP_NUM_THREADS if that is set.
cores() { env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc; }

# A free port: two runs on one machine must not collide on the launcher's default.
free_port() { python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'; }

# setup EXTRAS [VENV] [CONSTRAINTS]: make .venv and install the pinned packages, once per state of pyproject.toml and
# constraints.txt. What pip or uv says goes to .venv/setup.log.
# PYTHON chooses the interpreter; TORCH_INDEX_URL an index to take torch from (PyTorch's CPU index, say). Offline, from a
# folder of wheels: PIP_NO_INDEX=1 PIP_FIND_LINKS=folder.
setup() {
  local extras=$1 venv=${2:-$ROOT/.venv} constraints=${3:-constraints.txt} python="" stamp log start torch
  cd "$ROOT"
  log="$venv/setup.log" start=$(date +%s) torch=$(grep -E "^torch(vision)?==" "$constraints" | xargs)
  stamp="$venv/installed-$(cat pyproject.toml "$constraints" | sha256sum | cut -c1-16)-${extras:-base}"
  if [ -e "$stamp" ] || [ -e "${stamp%-*}-dev" ]; then return; fi
  for candidate in ${PYTHON:-python3.12 python3.11 python3}; do
    if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "clmoe needs Python 3.11, 3.12 or 3.13; none found (set PYTHON=/path/to/python)" >&2
    exit 2
  fi
  echo "Installing into ${venv#"$ROOT/"} ($("$python" --version)): two minutes, 2 GB, more with CUDA."
  echo "Log: $log"
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  packages ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} $torch &&
    packages $torch --editable ".${extras:+[$extras]}" || # naming torch again keeps the build that is installed
    {
      tail -n 20 "$log" >&2
      echo "the installation failed; the whole log is $log" >&2
      exit 3
    }
  PATH="$venv/bin:$PATH"
  touch "$stamp"
  echo "Installed in $(($(date +%s) - start)) s."
}

# packages ARGUMENTS: pip install with these, through uv if there is one; all output goes to the log.
packages() {
  if command -v uv >/dev/null; then
    uv pip install --python "$venv/bin/python" --compile-bytecode --constraint "$constraints" ${PIP_NO_INDEX:+--no-index} \
      ${PIP_FIND_LINKS:+--find-links "$PIP_FIND_LINKS"} "$@" >>"$log" 2>&1
  else
    "$venv/bin/python" -m pip install --constraint "$constraints" "$@" >>"$log" 2>&1
  fi
}
