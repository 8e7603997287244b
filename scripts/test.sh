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
chosen="not slow" least=85 all=
if [ "${1:-}" = --all ]; then
  shift
  chosen="not compiled" least=95 all=1
  NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet
fi
ruff check --quiet .
ruff format --check --quiet .
mypy --no-error-summary >.venv/types.log 2>&1 & # beside the tests, which leave a core idle at either end
types=$!
# One process more than there are cores, since some tests wait for processes of their own, and so one thread for each;
# -n 0 runs all tests in this one, as a debugger needs it.
export OMP_NUM_THREADS=1
pytest=(-m pytest -n "$(($(cores) + 1))" --maxprocesses 8 --dist worksteal --durations 10 --durations-min 1)
failed=0
if [ $# -gt 0 ]; then
  python "${pytest[@]}" "$@" || failed=$?
else
  # With --fail-under, slipcover would report on this process alone.
  python -m slipcover --source clmoe --json --out .venv/coverage.json "${pytest[@]}" -m "$chosen" || failed=$?
  if [ -n "$all" ]; then python "${pytest[@]}" -m compiled || failed=$?; fi
  python - "$least" <<'EOF' || failed=1
import json, sys
covered, least = json.load(open(".venv/coverage.json"))["summary"]["percent_covered"], float(sys.argv[1])
print(f"{covered:.1f} % of the package's lines are covered; at least {least:g} % must be")
sys.exit(covered < least)
EOF
fi
wait "$types" || { cat .venv/types.log && failed=1; }
exit "$failed"
