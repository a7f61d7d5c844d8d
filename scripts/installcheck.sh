#!/usr/bin/env bash
# pg_regress on what is installed where PG_CONFIG says, in a server of its own, with a stub in place of a model: it needs
# neither torch nor pytest. Never as root.
source "$(dirname "$0")/lib.sh"
use_postgres

OUT=$(as_server mktemp -d)
trap 'as_server rm -rf "$OUT"' EXIT

need_build_tools
[ -f "$SHAREDIR/extension/pg_autoembed.control" ] || die "pg_autoembed is not installed in $SHAREDIR: make install"

tar -C "$ROOT" --exclude=__pycache__ -cf - pgxs.mk pg_autoembed.control sql tests/regress tests/support | as_server tar -C "$OUT" -xf -
cd "$OUT"
as_server mkdir faults
as_server env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$OUT/tests" "$SITE/bin/python" - "$OUT/models" <<'PY'
import sys
from pathlib import Path

from support.stubs import add_stub

for dimensions in (16, 384):
    add_stub(Path(sys.argv[1]), f"stub-{dimensions}", dimensions=dimensions)
PY
as_server env PYTHONDONTWRITEBYTECODE=1 PYTHONPATH="$OUT/tests/support/faults" AUTOEMBED_FAULTS="$OUT/faults" \
    EMBEDDING_MODEL_DIR="$OUT/models" EMBEDDING_MODEL_NAME=stub-384 EMBEDDING_DEVICE=cpu \
    make -s -f pgxs.mk installcheck PG_CONFIG="$PG_CONFIG" OUT="$OUT" || {
    cat regression.diffs >&2
    rm -rf "$ROOT/build/regress" && mkdir -p "$ROOT/build" && cp -r results "$ROOT/build/regress"
    die "what came out instead is in build/regress; where it is right, it belongs into tests/regress/expected"
}
