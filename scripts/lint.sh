#!/usr/bin/env bash
# ruff, mypy, and shellcheck where there is one.
source "$(dirname "$0")/lib.sh"

STATE=$(state_dir)
cd "$ROOT"
PATH=$STATE/venv/bin:$PATH
export RUFF_CACHE_DIR=$STATE/cache/ruff MYPY_CACHE_DIR=$STATE/cache/mypy

ruff check --extend-exclude .pg,build .
ruff format --check --extend-exclude .pg,build .
mypy --strict plpython
mypy tests
if command -v shellcheck >/dev/null; then shellcheck -x -P scripts scripts/*.sh .ci/run; else say "no shellcheck here: shell not checked"; fi
