#!/usr/bin/env bash
# Joins sql/*.sql into the extension's install script and puts it, the control file and the command into place;
# `extension.sh remove` takes all of it away again, the site included.
source "$(dirname "$0")/lib.sh"
use_postgres

EXTENSION=${DESTDIR:-}$SHAREDIR/extension
COMMAND=${DESTDIR:-}${AUTOEMBED_BIN:-/usr/local/bin}/autoembed
BUILD=$ROOT/build

with_site() { sed "s|@SITE@|$(site_packages)|g" "$@"; }

# Copies only what differs, so that a second run needs neither root nor time.
put() { cmp -s "$2" "$3" || as_root install -D -m "$1" "$2" "$3"; }

build() {
    local upgrade
    mkdir -p "$BUILD"
    with_site "$ROOT"/sql/*.sql >"$BUILD/pg_autoembed--$VERSION.sql"
    for upgrade in "$ROOT"/sql/upgrade/*.sql; do
        [ ! -e "$upgrade" ] || with_site "$ROOT/sql/00_guard.sql" "$upgrade" >"$BUILD/$(basename "$upgrade")"
    done
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

if [ "${1:-}" = remove ]; then remove_files; else build; install_files; fi
