# The extension's SQL and its regression tests, as PGXS has them: scripts/extension.sh and scripts/installcheck.sh come
# here. SITE is where the Python packages are, OUT is for what the regression tests leave behind.
EXTENSION = pg_autoembed
RELEASE := $(shell sed -n "s/^default_version = '\(.*\)'/\1/p" pg_autoembed.control)
UPGRADES := $(patsubst sql/upgrade/%,build/%,$(wildcard sql/upgrade/*.sql))
DATA_built = build/pg_autoembed--$(RELEASE).sql $(UPGRADES)

REGRESS = install embed declare fill triggers failures search rights drop
REGRESS_OPTS = --inputdir=tests/regress --outputdir=$(OUT) --temp-instance=$(OUT)/instance \
	--temp-config=tests/regress/server.conf --encoding=UTF8 --no-locale

all: $(DATA_built)

# joining the SQL does without PGXS, which comes with PostgreSQL's headers
PG_CONFIG ?= pg_config
PGXS := $(shell $(PG_CONFIG) --pgxs)
-include $(PGXS)

build/pg_autoembed--$(RELEASE).sql: $(sort $(wildcard sql/*.sql)) build/site
	sed 's|@SITE@|$(SITE)|g' $(filter %.sql,$^) >$@

# each upgrade begins with the same guard
$(UPGRADES): build/%.sql: sql/00_guard.sql sql/upgrade/%.sql build/site
	sed 's|@SITE@|$(SITE)|g' $(filter %.sql,$^) >$@

build/site: FORCE
	@mkdir -p build
	@echo '$(SITE)' | cmp -s - $@ || echo '$(SITE)' >$@

.PHONY: FORCE
