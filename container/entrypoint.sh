#!/usr/bin/env bash
# Stands before the base image's entrypoint: gives the server its libraries, and after an upgrade of the image updates the
# extension in every database before anybody can connect.
set -euo pipefail

STATE=$PGDATA/pg_autoembed.image # the version, user and database that the volume was last served with
HBA=/usr/local/share/pg_autoembed/hba.conf
EXTENSIONS=$(pg_config --sharedir)/extension

UNFINISHED=$PGDATA/pg_autoembed.unfinished # there from the first init script of a new cluster to its last

warn() { printf 'pg_autoembed WARNING:  %s\n' "$@" >&2; }
die() { printf 'pg_autoembed ERROR:  %s\n' "$@" >&2; exit 1; }

is_server() {
    local argument
    [ "$1" = postgres ] || return 1
    for argument; do
        case $argument in --help | --version | --describe-config | -\? | -V | -C) return 1 ;; esac
    done
}

# As docker's own variables are read: NAME, or the contents of the file that NAME_FILE names.
variable() {
    local file=$1_FILE
    if [ -n "${!1:-}" ]; then echo "${!1}"; elif [ -r "${!file:-}" ]; then cat "${!file}"; else echo "$2"; fi
}

# Whoever starts the container as root wants the volume's owner put right.
become_postgres() {
    mkdir -p "$PGDATA"
    find "$PGDATA" /var/run/postgresql ! -user postgres -exec chown postgres {} +
    HOME=~postgres exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
}

# What the configuration has stays; only what is missing is added, or a volume of another image would lack it.
add_libraries() {
    local source=(-D "$PGDATA") found library
    has_cluster || source=(-D / -c "config_file=$(pg_config --sharedir)/postgresql.conf.sample")
    found=$(postgres -C shared_preload_libraries "${source[@]}" "${ARGUMENTS[@]}" 2>/dev/null) || return 0
    local all=$found
    for library in autoembed_preload pg_cron; do
        case ",${found//[\" ]/}," in *",$library,"*) ;; *) all=${all:+$all,}$library ;; esac
    done
    [ "$all" = "$found" ] || ARGUMENTS+=(-c "shared_preload_libraries=$all")
}

has_cluster() { [ -s "$PGDATA/PG_VERSION" ]; }
image_version() { sed -n "s/^default_version = '\(.*\)'/\1/p" "$EXTENSIONS/pg_autoembed.control"; }

may_need_update() {
    has_cluster && [ "$(cat "$PGDATA/PG_VERSION")" = "$PG_MAJOR" ] && [ "$(image_version)" != "${SERVED[0]:-}" ] &&
        [ ! -e "$PGDATA/standby.signal" ] && [ ! -e "$PGDATA/recovery.signal" ]
}

# A server that only this script can reach, and that runs no jobs. It may have a crash to recover from first.
private_server() {
    local options
    options=$(printf '%q ' "${ARGUMENTS[@]}" -c listen_addresses= -c "unix_socket_directories=$PGDATA" -c "hba_file=$HBA" -c port=5432 -c cron.launch_active_jobs=off \
        -c pg_autoembed.setup=on)  # so that the container is not called healthy before the real server is up
    EMBEDDING_PRELOAD='' pg_ctl -D "$PGDATA" -s -w -t 86400 -o "$options" start
}

# query DATABASE …: as superuser in databases of others, so their owners' search_path must not decide what is called, nor a
# database's name what it is connected to (-d would read one as connection options).
query() {
    PGDATABASE=$1 PGOPTIONS='-c search_path=pg_catalog' psql -X -q -A -t -v ON_ERROR_STOP=1 -h "$PGDATA" -p 5432 -U "${SERVED[1]}" "${@:2}"
}

update_database() {
    local outdated="select from pg_extension e join pg_available_extensions a on a.name = e.extname where e.extname = 'pg_autoembed' and e.extversion <> a.default_version"
    [ -n "$(query "$1" -c "select 1 where exists ($outdated)")" ] || return 0
    if query "$1" -c 'alter extension pg_autoembed update'; then
        echo "pg_autoembed: database $1 is updated to $(image_version)"
    else
        warn "database $1 keeps its former pg_autoembed, whose functions fail now: see the error above, then run there ALTER EXTENSION pg_autoembed UPDATE"
        return 1
    fi
}

update_all() {
    local databases database status=0
    databases=$(query template1 -c 'select datname from pg_database where datallowconn') || { warn "the databases could not be listed, so none is updated"; return 1; }
    while IFS= read -r database; do update_database "$database" </dev/null || status=1; done <<<"$databases"
    return $status
}

update_extension() {
    SERVED=("" "${SERVED[1]:-$(variable POSTGRES_USER postgres)}" "${SERVED[2]:-}")
    SERVED[2]=${SERVED[2]:-$(variable POSTGRES_DB "${SERVED[1]}")}
    echo "pg_autoembed: the image has $(image_version); is an update due in this volume?"
    private_server || { warn "the server did not start for it"; return 0; }
    if update_all; then printf '%s\n' "$(image_version)" "${SERVED[@]:1}" >"$STATE"; fi
    pg_ctl -D "$PGDATA" -s -w -m fast stop
}

# pg_cron's jobs are in the database that the image was first started with, unless the configuration names another.
name_cron_database() {
    case " ${ARGUMENTS[*]} " in *cron.database_name*) return ;; esac
    ! has_cluster || ! postgres -C cron.database_name -D "$PGDATA" "${ARGUMENTS[@]}" >/dev/null 2>&1 || return 0
    ARGUMENTS+=(-c "cron.database_name=${SERVED[2]:-$(variable POSTGRES_DB "$(variable POSTGRES_USER postgres)")}")
}

# The server that the base image's entrypoint runs for a new cluster loads no models: they are loaded once, by the real one.
make_cluster() {
    [ -x /docker-entrypoint-initdb.d/00_pg_autoembed.sh ] ||
        warn "something is mounted over /docker-entrypoint-initdb.d, so the extension is not created: mount single files into it, or run CREATE EXTENSION pg_autoembed CASCADE"
    type docker-ensure-initdb.sh >/dev/null 2>&1 || return 0
    UNFINISHED=$UNFINISHED EMBEDDING_PRELOAD='' docker-ensure-initdb.sh postgres "${ARGUMENTS[@]}" -c pg_autoembed.setup=on
    rm -f "$UNFINISHED"
}

[ "${1:0:1}" != - ] || set -- postgres "$@"
if is_server "$@"; then
    [ "$(id -u)" != 0 ] || become_postgres "$@"
    ARGUMENTS=("${@:2}")
    SERVED=()
    [ ! -r "$STATE" ] || mapfile -t SERVED <"$STATE"
    [ ! -e "$UNFINISHED" ] || die "the first start of this cluster did not get through its init scripts (its log says why), so it is half made: empty the volume $PGDATA and start again, or remove $UNFINISHED to use it as it is"
    name_cron_database
    add_libraries
    if ! has_cluster; then
        make_cluster
    elif may_need_update; then
        update_extension
    fi
    export EMBEDDING_PRELOAD=${EMBEDDING_PRELOAD-${EMBEDDING_MODEL_NAME:-}}
    set -- postgres "${ARGUMENTS[@]}"
fi
exec docker-entrypoint.sh "$@"
