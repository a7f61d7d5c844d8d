#!/usr/bin/env bash
# ruff, mypy, and shellcheck where there is one: all of them, also when the first finds something.
source "$(dirname "$0")/lib.sh"

STATE=$(state_dir)
cd "$ROOT"
PATH=$STATE/venv/bin:$PATH
export RUFF_CACHE_DIR=$STATE/cache/ruff MYPY_CACHE_DIR=$STATE/cache/mypy
STATUS=0

check() { "$@" || STATUS=1; }

check ruff check --extend-exclude .pg,build .
check ruff format --check --extend-exclude .pg,build .
check mypy --strict plpython tests demo bench
check env PYTHONPATH=plpython lint-imports --no-cache
if command -v shellcheck >/dev/null; then check shellcheck -x -P scripts scripts/*.sh container/*.sh tests/image/*.sh tests/image/*/*.sh .ci/run; else say "no shellcheck: shell is not checked"; fi
exit "$STATUS"
