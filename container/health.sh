#!/usr/bin/env bash
# HEALTHCHECK: what the view embedding_health says. Its warnings are shown and do no harm, a failure makes the container unhealthy.
# It asks as superuser: so with nothing but pg_catalog on the path, where nobody else can put a function.
set -euo pipefail

SERVED=()
[ ! -r "$PGDATA/pg_autoembed.image" ] || mapfile -t SERVED <"$PGDATA/pg_autoembed.image"
USER_NAME=${SERVED[1]:-${POSTGRES_USER:-postgres}}
DATABASE=${SERVED[2]:-${POSTGRES_DB:-$USER_NAME}}
PASSWORD=${POSTGRES_PASSWORD:-}
[ ! -r "${POSTGRES_PASSWORD_FILE:-}" ] || PASSWORD=$(<"$POSTGRES_PASSWORD_FILE")
export PGDATABASE=$DATABASE PGPASSWORD=$PASSWORD PGCONNECT_TIMEOUT=3 PGOPTIONS='-c search_path=pg_catalog -c statement_timeout=6s'

# Wherever this server listens: its port and its socket's directory.
[ -r "$PGDATA/postmaster.pid" ] || { echo "fail: no server is running"; exit 1; }
mapfile -t SERVER <"$PGDATA/postmaster.pid"
export PGPORT=${SERVER[3]:-5432}
[ -z "${SERVER[4]:-}" ] || export PGHOST=${SERVER[4]}

# A name or a message cannot begin a line of its own, so none can look like a failure.
ANSWER=$(psql -X -q -A -t -v ON_ERROR_STOP=1 --no-password -U "$USER_NAME" <<'SQL'
select 'fail: the cluster is still being set up' where current_setting('pg_autoembed.setup', true) = 'on';
select 'fail: extension pg_autoembed is not in database ' || current_database() || ' (CREATE EXTENSION pg_autoembed CASCADE)'
where not exists (select from pg_extension where extname = 'pg_autoembed');
select format($$select translate(concat(status, ': ', check_name, ': ', message, ' (' || nullif(hint, '') || ')'), E'\n\r', '  ') from %I.embedding_health where status <> 'ok'$$, n.nspname)
from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_autoembed' \gexec
SQL
) || exit 1
echo "${ANSWER:-ok}"
! grep -q ^fail <<<"$ANSWER" || exit 1
