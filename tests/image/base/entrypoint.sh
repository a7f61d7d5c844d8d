#!/usr/bin/env bash
# FOR TESTS ALONE: behaves towards Dockerfile.postgres as the official image's entrypoint does, as far as that goes.
set -euo pipefail

# NAME, or the contents of the file that NAME_FILE names.
setting() {
    local file=$1_FILE
    if [ -n "${!file:-}" ]; then export "$1=$(<"${!file}")"; else export "$1=${!1:-$2}"; fi
    unset "$file"
}

as_postgres() { exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"; }

need_password() {
    [ -z "$POSTGRES_PASSWORD" ] && [ "$POSTGRES_HOST_AUTH_METHOD" != trust ] || return 0
    echo "Error: this is a new cluster, and POSTGRES_PASSWORD is not set." >&2
    exit 1
}

new_cluster() {
    eval "initdb --username=\"\$POSTGRES_USER\" --pwfile=<(echo \"\$POSTGRES_PASSWORD\") $POSTGRES_INITDB_ARGS"
    echo "host all all all ${POSTGRES_HOST_AUTH_METHOD:-scram-sha-256}" >>"$PGDATA/pg_hba.conf"
}

sql() { psql -X -v ON_ERROR_STOP=1 --no-password -U "$POSTGRES_USER" -d "$@"; }

new_database() {
    [ "$POSTGRES_DB" = postgres ] || sql postgres -v name="$POSTGRES_DB" <<<'create database :"name";'
}

run_init_files() {
    local file
    for file in /docker-entrypoint-initdb.d/*; do
        echo "$0: $file"
        # shellcheck disable=SC1090
        case $file in
            *.sh) if [ -x "$file" ]; then "$file"; else source "$file"; fi ;;
            *.sql) sql "$POSTGRES_DB" -f "$file" ;;
            *) echo "$0: not of a kind that is run" ;;
        esac
    done
}

initialise() {
    need_password
    new_cluster
    export PGPASSWORD=$POSTGRES_PASSWORD
    pg_ctl -D "$PGDATA" -w -o "$(printf '%q ' "${@:2}" -c listen_addresses= -p "${PGPORT:-5432}")" start
    new_database
    run_init_files
    pg_ctl -D "$PGDATA" -w -m fast stop
    unset PGPASSWORD
    echo "PostgreSQL init process complete; ready for start up."
}

[ "${1:0:1}" != - ] || set -- postgres "$@"
if [ "$1" = postgres ]; then
    setting POSTGRES_PASSWORD ''
    setting POSTGRES_USER postgres
    setting POSTGRES_DB "$POSTGRES_USER"
    setting POSTGRES_INITDB_ARGS ''
    : "${POSTGRES_HOST_AUTH_METHOD:=}"
    mkdir -p "$PGDATA"
    chmod 700 "$PGDATA" || true
    if [ "$(id -u)" = 0 ]; then
        chown -R postgres "$PGDATA" /var/run/postgresql
        as_postgres "$@"
    fi
    [ -s "$PGDATA/PG_VERSION" ] || initialise "$@"
    [ "${0##*/}" != docker-ensure-initdb.sh ] || exit 0
fi
exec "$@"
