#!/usr/bin/env bash
# server.sh up|down|dsn|psql: the private server under .pg/. Its socket's directory is open to its own user (and root)
# alone; TCP is for 127.0.0.1 and asks for the password in .pg/server/password.
source "$(dirname "$0")/lib.sh"
use_postgres

STATE=$(state_dir)
SERVER=$STATE/server
DATABASE=autoembed
PACKAGED_MODEL=all-MiniLM-L6-v2
cd "$STATE"

pg_ctl() { as_server "$BINDIR/pg_ctl" -D "$SERVER/data" -s "$@"; }
running() { [ -d "$SERVER/data" ] && pg_ctl status >/dev/null; }
query() { as_server "$BINDIR/psql" -X -q -t -A -v ON_ERROR_STOP=1 "$(dsn "$1")" -c "$2"; }
dsn() { echo "host=$SERVER/run port=$(cat "$SERVER/port") dbname=$1 user=postgres"; }

# The port of last time if it is still free, else any.
free_port() {
    "$PYTHON" - "$(cat "$SERVER/port" 2>/dev/null || echo 0)" <<'PY'
import socket, sys
for port in (int(sys.argv[1]), 0):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        print(probe.getsockname()[1])
        break
PY
}

create() {
    say "a private server in $SERVER"
    if is_root; then install -d -o postgres -g postgres "$SERVER"; else mkdir -p "$SERVER"; fi
    as_server mkdir -p -m 700 "$SERVER/run"
    as_server sh -c "umask 077; head -c 18 /dev/urandom | base64 >'$SERVER/password'"
    as_server "$BINDIR/initdb" -D "$SERVER/data" -U postgres --encoding=UTF8 --locale=C.UTF-8 --data-checksums \
        --auth-local=trust --auth-host=scram-sha-256 --pwfile="$SERVER/password" >/dev/null
    echo "create database $DATABASE" | as_server "$BINDIR/postgres" --single -c log_checkpoints=off -D "$SERVER/data" postgres >/dev/null
    echo "include 'private.conf'" | as_server tee -a "$SERVER/data/postgresql.conf" >/dev/null
}

configuration() {
    cat <<CONF
listen_addresses = '127.0.0.1'
port = $1
unix_socket_directories = '$SERVER/run'
shared_buffers = '256MB'
maintenance_work_mem = '256MB'
max_wal_size = '4GB'
log_line_prefix = '%m [%p] %q%u@%d '
CONF
    [ -f "$PKGLIBDIR/pg_cron.so" ] || { echo "shared_preload_libraries = 'autoembed_preload'"; return; }
    cat <<CONF
shared_preload_libraries = 'autoembed_preload, pg_cron'
cron.database_name = '$DATABASE'
cron.use_background_workers = on
max_worker_processes = 20
CONF
}

# Which models its postmaster loads: EMBEDDING_PRELOAD if set (empty: none), else the demo's if it is there yet.
preloaded() {
    local models=${EMBEDDING_MODEL_DIR:-/var/lib/pg_autoembed/models} model=${DEMO_MODEL:-$PACKAGED_MODEL}
    [ -f "$models/$model/autoembed.json" ] || model=$PACKAGED_MODEL
    echo "${EMBEDDING_PRELOAD-$model}"
}

start() {
    local port
    port=$(free_port)
    echo "$port" | as_server tee "$SERVER/port" >/dev/null
    configuration "$port" | as_server tee "$SERVER/data/private.conf" >/dev/null
    EMBEDDING_PRELOAD=$(preloaded) pg_ctl -w -l "$SERVER/log" start || { tail -n 20 "$SERVER/log" >&2; die "the private server did not start"; }
}

create_extension() {
    query "$DATABASE" "set client_min_messages = warning; create extension if not exists pg_autoembed cascade"
    installed_sql | as_server tee "$SERVER/extension.stamp" >/dev/null
}

installed_sql() { sha256sum "$SHAREDIR/extension/pg_autoembed--$VERSION.sql"; }
has_extension() { [ "$(query "$DATABASE" "select 1 from pg_extension where extname = 'pg_autoembed'")" = 1 ]; }

up() {
    [ -d "$SERVER/data" ] || create
    running || start
    has_extension || create_extension
    is_stamped "$SERVER/extension.stamp" "$(installed_sql)" ||
        say "the extension's SQL has changed since this server got it: 'make clean up' starts afresh"
    say "the private server is up: $(dsn "$DATABASE")"
}

down() { if running; then pg_ctl -m fast stop; fi; }
need_running() { running || die "the private server is not running: make up"; }

case ${1:-} in
    up) up ;;
    down) down ;;
    dsn) need_running; dsn "$DATABASE" ;;
    psql) need_running; exec "$BINDIR/psql" "$(dsn "$DATABASE")" ;;
    *) die "usage: server.sh up|down|dsn|psql" ;;
esac
