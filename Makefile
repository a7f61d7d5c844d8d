# pg_autoembed. The work is in scripts/; each step notices by itself what is done already.

# Which PostgreSQL: the newest one found, unless named (PG_CONFIG=/usr/lib/postgresql/17/bin/pg_config).
PG_CONFIG ?=
# The Python that PostgreSQL's PL/Python is linked to.
PYTHON ?= /usr/bin/python3
# torch: the CPU build. The index is asked when pip's own configuration does not have this version.
TORCH_VERSION ?= 2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# The command `autoembed` goes here.
AUTOEMBED_BIN ?= /usr/local/bin
DEMO_MODEL ?= all-MiniLM-L6-v2
JOBS ?= $(shell nproc)
export PG_CONFIG PYTHON TORCH_VERSION TORCH_INDEX AUTOEMBED_BIN DEMO_MODEL JOBS DESTDIR PYTEST_ARGS

.DEFAULT_GOAL := help
.PHONY: help demo test unit test-all up down dsn psql all install installcheck dependencies uninstall bench lint lock golden clean dev image image-test
.NOTPARALLEL:

help:       ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 18

demo: up dev  ## an embedded corpus and a search, from a bare machine on
	@scripts/model.sh $(DEMO_MODEL)
	@scripts/run.sh demo/run

test: install dev  ## the tests; one of them: PYTEST_ARGS="tests/test_fill.py -k name --no-cov"
	@scripts/test.sh -m "not slow"

unit:       ## the tests that need no server; one of them: PYTEST_ARGS="-k name"
	@scripts/deps.sh
	@scripts/site.sh dependencies
	@scripts/dev.sh
	@scripts/test.sh -o testpaths=tests/unit --no-cov

test-all: install dev  ## the tests, slow ones too, pg_regress and the image's
	@scripts/test.sh
	@scripts/installcheck.sh
	@scripts/image.sh test
	@scripts/image.sh suite tests -m "not slow"

image:      ## Dockerfile.postgres as IMAGE (TORCH_VERSION, MODEL, PG_IMAGE: see its head)
	@scripts/image.sh build

image-test: dev  ## the image's tests, and those of the SQL by the image's PostgreSQL
	@scripts/image.sh test
	@scripts/image.sh suite

up: install  ## start a private server under .pg/ with the extension in it
	@scripts/server.sh up

down:       ## stop it
	@scripts/server.sh down

dsn:        ## its connection string
	@scripts/server.sh dsn

psql:       ## open it
	@scripts/server.sh psql

install:    ## into the PostgreSQL that PG_CONFIG names; with DESTDIR only the files, for packagers
ifndef DESTDIR
	@scripts/deps.sh
	@scripts/pgvector.sh
endif
	@scripts/site.sh
	@scripts/extension.sh
	@scripts/preload.sh
ifndef DESTDIR
	@scripts/model.sh
endif

dependencies:  # the part of install that changes least, for the image's layers
	@scripts/site.sh dependencies

all:        # what install puts in place, built, as packagers' tools ask for it
	@scripts/extension.sh build
	@scripts/preload.sh build

installcheck:  ## pg_regress on what is installed where PG_CONFIG says; needs neither torch nor a running server
	@scripts/installcheck.sh

uninstall:  ## take it away again; models stay
	@scripts/extension.sh remove
	@scripts/preload.sh remove

bench: up dev  ## the benchmarks, printed as a table (BENCH="pipeline --rows 512" chooses)
	@scripts/run.sh bench/run $(BENCH)

golden: install dev  # tests/golden/interface.txt, after an agreed change of what users call
	@scripts/golden.sh

lock:       # constraints.txt, after a change of pyproject.toml's packages (LOCK=--upgrade: with newer versions of all others)
	@scripts/lock.sh $(LOCK)

lint: install dev  ## ruff, mypy, shellcheck
	@scripts/lint.sh

clean:      ## stop the private server, remove .pg/ and build/
	@scripts/clean.sh

dev: install
	@scripts/deps.sh dev
	@scripts/dev.sh
