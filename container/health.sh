#!/usr/bin/env bash
# HEALTHCHECK: what the view embedding_health says. Its warnings are shown and do no harm, a failure makes the container unhealthy.
set -euo pipefail

SERVED=()
[ ! -r "$PGDATA/pg_autoembed.image" ] || mapfile -t SERVED <"$PGDATA/pg_autoembed.image"
USER_NAME=${SERVED[1]:-${POSTGRES_USER:-postgres}}
DATABASE=${SERVED[2]:-${POSTGRES_DB:-$USER_NAME}}
export PGPASSWORD=${POSTGRES_PASSWORD:-} PGCONNECT_TIMEOUT=5 PGOPTIONS='-c statement_timeout=8s'

# The server of a container that is still being set up takes no connections from outside.
ANSWER=$(psql -X -q -A -t -v ON_ERROR_STOP=1 --no-password -U "$USER_NAME" -d "$DATABASE" <<'SQL'
select 'fail: the cluster is still being set up' from pg_settings where name = 'listen_addresses' and setting = '' and source = 'command line';
select 'fail: extension pg_autoembed is not in database ' || current_database() || ' (CREATE EXTENSION pg_autoembed CASCADE)'
where not exists (select from pg_extension where extname = 'pg_autoembed');
select format($$select concat(status, ': ', check_name, ': ', message, ' (' || nullif(hint, '') || ')') from %I.embedding_health where status <> 'ok'$$, n.nspname)
from pg_extension e join pg_namespace n on n.oid = e.extnamespace where e.extname = 'pg_autoembed' \gexec
SQL
)
echo "${ANSWER:-ok}"
! grep -q ^fail <<<"$ANSWER"
