#!/usr/bin/env bash
# FOR TESTS ALONE, in the container: the tests of the mounted checkout, by the PostgreSQL and the package of the image.
set -euo pipefail

WORK=$(mktemp -d)
tar -C /checkout --exclude=./.git --exclude=./.pg --exclude=./build --exclude=__pycache__ -cf - . | tar -C "$WORK" -xf -
cd "$WORK"
ln -sf "$(pg_config --pkglibdir)"/pg_autoembed/*/lib/python*/site-packages/autoembed/encoding/packed/_kernels*.so plpython/autoembed/encoding/packed/
# No exec: what the tests leave behind is this shell's to reap.
PYTHONDONTWRITEBYTECODE=1 /src/.pg/venv/bin/python -m pytest -p no:cacheprovider "$@"
