#!/usr/bin/env bash
# Writes tests/golden/interface.txt anew, from the extension as the checkout has it.
source "$(dirname "$0")/lib.sh"

NEW=$(as_server mktemp)
trap 'as_server rm -f "$NEW"' EXIT
PYTEST_ARGS="" AUTOEMBED_GOLDEN=$NEW "$ROOT/scripts/test.sh" --no-cov -q tests/test_interface.py
cat "$NEW" >"$ROOT/tests/golden/interface.txt"
git -C "$ROOT" diff --stat -- tests/golden || true
