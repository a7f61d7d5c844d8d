#!/usr/bin/env bash
# The dev venv: pytest, ruff, mypy and what the demo needs. It sees the site's packages, so torch is installed once.
source "$(dirname "$0")/lib.sh"
use_postgres

STATE=$(state_dir)
VENV=$STATE/venv
STAMP="$SITE $(python_version) $(requirements dev | tr '\n' ' ')$(sha256sum <"$LOCK")"
! is_stamped "$VENV/dev.stamp" "$STAMP" || exit 0

say "dev venv in $VENV"
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
site_packages >"$VENV/lib/python$(python_version)/site-packages/pg_autoembed.pth"
requirements dev >"$VENV/requirements.txt"
"$VENV/bin/python" -m pip install -r "$VENV/requirements.txt" -c "$LOCK"
echo "$STAMP" >"$VENV/dev.stamp"
