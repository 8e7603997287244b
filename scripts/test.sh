#!/usr/bin/env bash
# Set up an environment with the development tools and check the code.
#
#   bash scripts/test.sh [--all] [pytest arguments]
#
# Without --all: lint, types and the fast tests, in minutes; line coverage of the package must be at least 85 %. With
# --all: every test, coverage at least 95 %, and the documentation's site. Arguments replace the choice of tests.
source "$(dirname "$0")/common.sh"
setup dev
cd "$ROOT"
chosen=(-m "not slow") least=85 unmeasured=()
if [ "${1:-}" = --all ]; then
  shift
  chosen=(-m "not slow or measured") least=95 unmeasured=(-m "slow and not measured")
  NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
fi
ruff check --quiet .
ruff format --check --quiet .
mypy --no-error-summary >.venv/types.log 2>&1 & # beside the tests, which leave a core idle at either end
types=$!
coverage=(--cov=clmoe --cov-report= --cov-fail-under="$least")
if [ $# -gt 0 ]; then chosen=() coverage=() unmeasured=(); fi
# One process more than there are cores, since some tests wait for processes of their own, and so one thread for each;
# -n 0 runs all tests in this one, as a debugger needs it.
export OMP_NUM_THREADS=1
tests() {
  python -m pytest -n "$(($(cores) + 1))" --maxprocesses 8 --dist worksteal --durations 10 --durations-min 1 "$@" || failed=$?
}
failed=0
tests "${chosen[@]}" "${coverage[@]}" "$@"
# Nearly all of their lines are those of the fast ones, and tracing cost two of them 60 % more CPU time.
if [ ${#unmeasured[@]} -gt 0 ]; then tests "${unmeasured[@]}"; fi
wait "$types" || { cat .venv/types.log && failed=1; }
exit "$failed"
