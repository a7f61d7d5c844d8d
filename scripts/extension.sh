#!/usr/bin/env bash
# Puts the extension's SQL, which pgxs.mk joins, its control file and the command into place; `extension.sh build` only
# builds them, `extension.sh remove` takes all of it away again, the site included.
source "$(dirname "$0")/lib.sh"
use_postgres

EXTENSION=${DESTDIR:-}$SHAREDIR/extension
COMMAND=${DESTDIR:-}${AUTOEMBED_BIN:-/usr/local/bin}/autoembed
BUILD=$ROOT/build

# Copies only what differs, so that a second run needs neither root nor time.
put() { cmp -s "$2" "$3" || as_root install -D -m "$1" "$2" "$3"; }

build() {
    make -s -C "$ROOT" -f pgxs.mk all PG_CONFIG="$PG_CONFIG" SITE="$(site_packages)"
    printf '#!/bin/sh\nexec "%s/bin/python" -I -m autoembed "$@"\n' "$SITE" >"$BUILD/autoembed"
}

install_files() {
    local script
    for script in "$BUILD"/pg_autoembed--*.sql; do put 644 "$script" "$EXTENSION/$(basename "$script")"; done
    put 644 "$ROOT/pg_autoembed.control" "$EXTENSION/pg_autoembed.control"
    put 755 "$BUILD/autoembed" "$COMMAND"
}

remove_files() {
    as_root rm -rf "$EXTENSION"/pg_autoembed.control "$EXTENSION"/pg_autoembed--*.sql "$COMMAND" "${DESTDIR:-}$PKGLIBDIR/pg_autoembed"
    say "removed; models stay in ${EMBEDDING_MODEL_DIR:-/var/lib/pg_autoembed/models}"
}

case ${1:-} in
    remove) remove_files ;;
    build) build ;;
    *) build; install_files ;;
esac
