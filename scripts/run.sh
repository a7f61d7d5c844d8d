#!/usr/bin/env bash
# run.sh PROGRAM: runs demo/run or bench/run against the private server, with the PostgreSQL manual as their text.
source "$(dirname "$0")/lib.sh"
use_postgres

STATE=$(state_dir)
DOC=postgresql-doc-$(pg_major)

# Unpacked, not installed: slim systems drop what a package puts under /usr/share/doc.
fetch_manual() {
    local dir=$STATE/manual
    [ ! -d "$dir/usr" ] || return 0
    say "the PostgreSQL manual ($DOC)"
    rm -rf "$dir" && mkdir -p "$dir"
    apt-cache show "$DOC" >/dev/null 2>&1 || as_root apt-get update -qq
    (cd "$dir" && apt-get -qq -o APT::Sandbox::User= download "$DOC" && dpkg-deb -x ./*.deb . && rm ./*.deb)
}

fetch_manual
AUTOEMBED_DOC_DIR=$(dirname "$(find "$STATE/manual" -name index.html | head -n1)")
AUTOEMBED_DSN=$("$ROOT/scripts/server.sh" dsn)
export AUTOEMBED_DOC_DIR AUTOEMBED_DSN AUTOEMBED_STATE=$STATE PYTHONDONTWRITEBYTECODE=1
cd "$ROOT"
exec "$STATE/venv/bin/python" "$@"
