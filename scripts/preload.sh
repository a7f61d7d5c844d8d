#!/usr/bin/env bash
# Builds the library autoembed_preload and puts it beside PostgreSQL's others; `preload.sh build` builds it only,
# `preload.sh remove` takes it away again.
source "$(dirname "$0")/lib.sh"
use_postgres

LIBRARY=autoembed_preload.so
TARGET=${DESTDIR:-}$PKGLIBDIR/$LIBRARY
BUILD=$ROOT/build/preload

# Out of the source tree. -march and the like stay out, so that the library also runs on another machine.
build() {
    local stamp
    stamp="$("$PG_CONFIG" --version) $(site_packages) $(cd "$ROOT/preload" && sha256sum ./* | sha256sum)"
    ! { [ -f "$BUILD/$LIBRARY" ] && is_stamped "$BUILD/stamp" "$stamp"; } || return 0
    say "library autoembed_preload for PostgreSQL $(pg_major)"
    [ -n "${DESTDIR:-}" ] || need_build_tools
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

remove() {
    [ ! -e "$TARGET" ] || say "autoembed_preload goes too: a server whose shared_preload_libraries name it will not start"
    as_root rm -f "$TARGET"
}

case ${1:-} in
    remove) remove ;;
    build) build ;;
    *) build; put ;;
esac
