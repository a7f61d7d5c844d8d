#!/usr/bin/env bash
# What the extension needs of the system: a PostgreSQL server with PL/Python, and a Python that can make a venv.
# `deps.sh dev` adds what only the tests need: pg_cron, without which the product works.
source "$(dirname "$0")/lib.sh"

CLUSTER_CONF=/etc/postgresql-common/createcluster.conf

default_major() { apt-cache depends postgresql | sed -nE 's/.*Depends: postgresql-([0-9]+)$/\1/p' | head -n1; }

# Debian's package makes and starts a cluster of its own when it is first installed: not our business, so not here.
install_server() {
    apt_install postgresql-common
    as_root sed -i.autoembed 's/^#create_main_cluster = true/create_main_cluster = false/' "$CLUSTER_CONF"
    apt_install "$@" || { as_root mv "$CLUSTER_CONF.autoembed" "$CLUSTER_CONF"; die "apt could not install: $*"; }
    as_root mv "$CLUSTER_CONF.autoembed" "$CLUSTER_CONF"
}

installed() { [ -x "$(find_pg_config)" ] && use_postgres && [ -x "$BINDIR/postgres" ]; }
has_plpython() { use_postgres && [ -f "$PKGLIBDIR/plpython3.so" ] && [ -f "$SHAREDIR/extension/plpython3u.control" ]; }
has_compiler() { type gcc >/dev/null 2>&1 && [ -f /usr/include/stdint.h ]; }  # the package's C
has_venv() { "$PYTHON" -c 'import venv, ensurepip' 2>/dev/null; }

[ -z "${PG_CONFIG:-}" ] || [ -x "$PG_CONFIG" ] || die "PG_CONFIG=$PG_CONFIG is no program"

if [ "${1:-}" = dev ]; then
    use_postgres
    [ ! -f "$SHAREDIR/extension/pg_cron.control" ] || exit 0
    say "pg_cron, for the tests"
    apt_install "postgresql-$(pg_major)-cron" || { as_root apt-get update -qq; apt_install "postgresql-$(pg_major)-cron"; } ||
        say "apt has no pg_cron for PostgreSQL $(pg_major): install it, or the tests of embed_schedule fail"
    exit 0
fi
installed && has_plpython && has_venv && has_compiler && exit 0

say "packages of the system: PostgreSQL, PL/Python, venv"
as_root apt-get update -qq
if [ -x "$(find_pg_config)" ]; then PG_CONFIG=$(find_pg_config); MAJOR=$(pg_major); else MAJOR=$(default_major); fi
installed || install_server "postgresql-$MAJOR"
has_plpython || apt_install "postgresql-plpython3-$MAJOR"
has_venv || apt_install python3-venv
has_compiler || apt_install gcc libc6-dev
{ installed && has_plpython && has_venv; } || die "PostgreSQL $MAJOR at ${BINDIR:-?} still lacks a server, PL/Python or venv"
