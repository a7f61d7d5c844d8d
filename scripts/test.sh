#!/usr/bin/env bash
# test.sh [pytest's arguments]: the tests, never as root. What root's checkout holds is copied to where the postgres user
# can read it. Without PYTEST_ARGS the coverage of the package, backends included, must be 95 % or more.
source "$(dirname "$0")/lib.sh"
use_postgres

STATE=$(state_dir)
WORK=$ROOT

copy_for_server_user() {
    WORK=$STATE/test.$$
    trap 'rm -rf "$WORK"' EXIT
    install -d -o postgres -g postgres "$WORK"
    tar -C "$ROOT" --exclude=./.git --exclude=./.pg --exclude=./build --exclude=__pycache__ -cf - . | as_server tar -C "$WORK" -xf -
}

! is_root || copy_for_server_user
cd "$WORK"
# The tree's package comes before the installed one, and has no C of its own.
"$ROOT/scripts/kernels.sh"
as_server ln -sf "$STATE"/kernels/autoembed/encoding/packed/_kernels*.so plpython/autoembed/encoding/packed/
COVERAGE=(--cov=autoembed --cov-config=tests/support/coverage.ini)
[ -n "${PYTEST_ARGS:-}" ] || COVERAGE+=(--cov-fail-under=95)
eval "ARGUMENTS=(${PYTEST_ARGS:-})"  # as a shell reads it: PYTEST_ARGS='-k "one or other"'
as_server env PG_CONFIG="$PG_CONFIG" PYTHONDONTWRITEBYTECODE=1 \
    "$STATE/venv/bin/python" -m pytest "${COVERAGE[@]}" "$@" "${ARGUMENTS[@]}"
