#!/usr/bin/env bash
# Builds the library autoembed_preload and puts it beside PostgreSQL's others; `preload.sh remove` takes it away again.
source "$(dirname "$0")/lib.sh"
use_postgres

LIBRARY=autoembed_preload.so
TARGET=${DESTDIR:-}$PKGLIBDIR/$LIBRARY
BUILD=$ROOT/build/preload

have_build_tools() { [ -f "$("$PG_CONFIG" --includedir-server)/postgres.h" ] && type gcc make >/dev/null 2>&1; }

# Out of the source tree. -march and the like stay out, so that the library also runs on another machine.
build() {
    local stamp
    stamp="$("$PG_CONFIG" --version) $(site_packages) $(cd "$ROOT/preload" && sha256sum ./* | sha256sum)"
    ! { [ -f "$BUILD/$LIBRARY" ] && is_stamped "$BUILD/stamp" "$stamp"; } || return 0
    say "library autoembed_preload for PostgreSQL $(pg_major)"
    if [ -z "${DESTDIR:-}" ] && ! have_build_tools; then
        apt_install "postgresql-server-dev-$(pg_major)" gcc libc6-dev make
    fi
    rm -rf "$BUILD" && mkdir -p "$BUILD"
    cp "$ROOT"/preload/* "$BUILD"
    env -u DESTDIR make -s -C "$BUILD" PG_CONFIG="$PG_CONFIG" SITE="$(site_packages)"
    echo "$stamp" >"$BUILD/stamp"
}

# A running server has the former one mapped: install replaces the file and does not write over it.
put() {
    ! cmp -s "$BUILD/$LIBRARY" "$TARGET" || return 0
    as_root install -D -m 755 "$BUILD/$LIBRARY" "$TARGET"
    say "to have a server load models once, for all its sessions: shared_preload_libraries = 'autoembed_preload'"
    say "in postgresql.conf, EMBEDDING_PRELOAD=NAME[,NAME] in its environment, and a restart"
}

if [ "${1:-}" = remove ]; then
    [ ! -e "$TARGET" ] || say "autoembed_preload goes too: a server whose shared_preload_libraries name it will not start"
    as_root rm -f "$TARGET"
else
    build
    put
fi
