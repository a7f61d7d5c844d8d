#!/usr/bin/env bash
# A new cluster: the extension in the default database, and a job that fills what its superuser declares there.
# AUTOEMBED_SCHEDULE is what embed_schedule takes; empty for no job.
set -euo pipefail

SCHEDULE=${AUTOEMBED_SCHEDULE-10 seconds}
[ -z "${UNFINISHED:-}" ] || touch "$UNFINISHED"

query() { psql -X -q -v ON_ERROR_STOP=1 --no-password -U "$POSTGRES_USER" -d "$POSTGRES_DB" "$@"; }

query <<'SQL'
set client_min_messages = warning;
create extension pg_autoembed cascade;
create extension pg_cron;
select cron.schedule('purge job_run_details', '0 3 * * *', 'delete from cron.job_run_details where end_time < now() - interval ''7 days''') \g /dev/null
SQL

schedule() {
    query -v schedule="$SCHEDULE" <<'SQL'
set client_min_messages = warning;
select format('pg_autoembed: job %s, %s: %s', job, job_schedule, command) from embed_schedule(:'schedule') \g (format=unaligned tuples_only=on)
SQL
}

[ -z "$SCHEDULE" ] || schedule ||
    printf 'pg_autoembed WARNING:  %s\n' "there is no job, so nothing fills by itself: AUTOEMBED_SCHEDULE is no schedule, as the error above says (it is read for a new cluster only; make the job by: select * from embed_schedule('10 seconds'))" >&2

version=$(sed -n "s/^default_version = '\(.*\)'/\1/p" "$(pg_config --sharedir)/extension/pg_autoembed.control")
printf '%s\n' "$version" "$POSTGRES_USER" "$POSTGRES_DB" >"$PGDATA/pg_autoembed.image"
