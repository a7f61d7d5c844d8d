#!/usr/bin/env bash
# Compiles the package's C for the tests, which run the checkout's package and not the installed one.
source "$(dirname "$0")/lib.sh"
use_postgres

KERNELS=$(state_dir)/kernels

build() {
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    say "the package's C, for the tests"
    cp -r "$ROOT/pyproject.toml" "$ROOT/plpython" "$WORK"
    rm -rf "$KERNELS"
    (cd "$WORK" && "$SITE/bin/python" -W ignore -c "import setuptools; setuptools.setup()" -q build_ext --build-lib "$KERNELS")
    echo "$1" >"$KERNELS/stamp"
}

STAMP="$SITE $(python_version) $(cd "$ROOT" && find plpython pyproject.toml -name '*.[ch]' -o -name '*.toml' | sort | xargs sha256sum | sha256sum)"
is_stamped "$KERNELS/stamp" "$STAMP" || build "$STAMP"
