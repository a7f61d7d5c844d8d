#!/usr/bin/env bash
# The versioned site beside PostgreSQL's libraries: a venv with the pinned dependencies and the package `autoembed`.
# Built as the invoking user (whose pip configuration and cache count), then moved into place as root.
source "$(dirname "$0")/lib.sh"
use_postgres

TARGET=${DESTDIR:-}$SITE

pip_in() { "$1/bin/python" -m pip "${@:2}"; }

check_python() {
    local linked
    linked=$(ldd "$PKGLIBDIR/plpython3.so" | sed -nE 's/.*libpython([0-9]+\.[0-9]+).*/\1/p' | head -n1)
    [ "$linked" = "$(python_version)" ] ||
        die "PL/Python is linked to Python $linked, but PYTHON=$PYTHON is $(python_version): set PYTHON to python$linked"
}

# The local version (+cpu) makes sure that no index, whichever answers, brings the CUDA build unasked.
install_torch() {
    pip_in "$1" install --no-compile --no-deps "torch==$TORCH_VERSION" 2>/dev/null ||
        pip_in "$1" install --no-compile --no-deps "torch==$TORCH_VERSION" --index-url "$TORCH_INDEX"
}

# On all cores, which pip does not; some packages carry templates that are no Python. -s: sources are elsewhere soon.
compile_all() { "$1/bin/python" -m compileall -q -j "${JOBS:-0}" -s "$1" -p "$SITE" "$1/lib" >/dev/null || true; }

install_dependencies() {
    local stage
    stage=$(state_dir)/site
    say "Python dependencies into $TARGET (torch $TORCH_VERSION; a few minutes the first time)"
    rm -rf "$stage"
    "$PYTHON" -m venv "$stage"
    install_torch "$stage"
    requirements dependencies >"$stage/requirements.txt"
    pip_in "$stage" install --no-compile setuptools "torch==$TORCH_VERSION" -r "$stage/requirements.txt"
    compile_all "$stage"
    # Both name the staging directory, and nobody needs them.
    find "$stage/bin" -type f -delete
    sed -i '/^command = /d' "$stage/pyvenv.cfg"
    echo "$1" >"$stage/dependencies.stamp"
    as_root rm -rf "$TARGET"
    as_root mkdir -p "$(dirname "$TARGET")"
    as_root mv "$stage" "$TARGET"
    [ -n "${DESTDIR:-}" ] || as_root chown -R root:root "$TARGET"
}

# The wheel is built as the user, in a copy: a build by root leaves nothing behind in the checkout.
install_package() {
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    say "package autoembed $VERSION"
    cp -r "$ROOT/pyproject.toml" "$ROOT/plpython" "$WORK"
    pip_in "$TARGET" wheel --no-deps --no-build-isolation --wheel-dir "$WORK" "$WORK"
    as_root env PIP_QUIET=2 PIP_ROOT_USER_ACTION=ignore "$TARGET/bin/python" -m pip install --no-deps --no-index --force-reinstall "$WORK"/*.whl
    echo "$1" | as_root tee "$TARGET/package.stamp" >/dev/null
}

package_stamp() { (cd "$ROOT" && find plpython pyproject.toml -name '*.py' -o -name '*.c' -o -name '*.toml' -o -name py.typed | sort | xargs sha256sum | sha256sum); }

check_python
STAMP="python $(python_version), torch $TORCH_VERSION, $(requirements dependencies | tr '\n' ' ')"
is_stamped "$TARGET/dependencies.stamp" "$STAMP" || install_dependencies "$STAMP"
[ "${1:-}" != dependencies ] || exit 0  # an image keeps them as a layer of their own
STAMP=$(package_stamp)
is_stamped "$TARGET/package.stamp" "$STAMP" || install_package "$STAMP"
