#!/usr/bin/env bash
# The versioned site beside PostgreSQL's libraries: a venv with the pinned dependencies and the package `autoembed`.
# Built as the invoking user (whose pip configuration and cache count), then moved into place as root.
source "$(dirname "$0")/lib.sh"
use_postgres

TARGET=${DESTDIR:-}$SITE
BLAS_PACKAGE=libopenblas0-openmp

pip_in() { "$1/bin/python" -m pip "${@:2}"; }

check_python() {
    local linked
    linked=$(ldd "$PKGLIBDIR/plpython3.so" | sed -nE 's/.*libpython([0-9]+\.[0-9]+).*/\1/p' | head -n1)
    [ "$linked" = "$(python_version)" ] ||
        die "PL/Python is linked to Python $linked, but PYTHON=$PYTHON is $(python_version): set PYTHON to python$linked"
}

# try_torch STAGE [pip's options]: a failure's last words, so that a full disk does not look like a missing wheel.
try_torch() {
    local said
    said=$(pip_in "$1" install --no-compile --no-deps "torch==$TORCH_VERSION" "${@:2}" 2>&1 >/dev/null) && return
    printf '%s\n' "$said" | sed -e '/^[[:space:]]*$/d' -e 's/^\(.\{300\}\).*/\1 …/' -e 's/^/pip: /' | tail -n 2 >&2
    return 1
}

# The local version (+cpu) makes sure that no index, whichever answers, brings the CUDA build unasked.
install_torch() {
    local first second
    if [ "$TORCH_VERSION" != system ]; then
        first=$(try_torch "$1" 2>&1) && return
        second=$(try_torch "$1" --index-url "$TORCH_INDEX" 2>&1) && return
        printf '%s\n' "$first" "$second" >&2  # what one index lacks is no news where the other has it
        say "no torch $TORCH_VERSION for Python $(python_version) in pip's index or $TORCH_INDEX: the system's instead"
    fi
    get_system_torch
    link_system_torch "$1"
}

# Debian's is for the CPU, and computes with whichever BLAS the system has: the reference one is many times slower.
get_system_torch() {
    [ -z "${DESTDIR:-}" ] && apt_has python3-torch "$(oldest_torch)" || return 0
    apt_install python3-torch "$BLAS_PACKAGE"
}

apt_has() {
    local candidate
    candidate=$(apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: //p')
    [ -n "$candidate" ] && dpkg --compare-versions "$candidate" ge "$2"
}

oldest_torch() { requirements dependencies | sed -n 's/^torch>=\([0-9.]*\).*/\1/p'; }

# Links, and no venv that sees all of the system's packages: the site's own come first, also for its sentence-transformers.
link_system_torch() {
    local origin part
    origin=$("$PYTHON" -I -c 'import importlib.util as u; s = u.find_spec("torch"); print(s.origin if s else "")')
    [ -n "$origin" ] || die "no torch: set TORCH_VERSION and TORCH_INDEX to one for Python $(python_version), or install a system-wide one"
    origin=$(dirname "$(dirname "$origin")")
    for part in "$origin"/{torch,torchgen,functorch} "$origin"/torch-*.{egg,dist}-info; do
        [ ! -e "$part" ] || ln -s "$part" "$1/lib/python$(python_version)/site-packages/"
    done
}

torch_version() { "$1/bin/python" -I -c 'from importlib.metadata import version; print(version("torch"))'; }

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
    pip_in "$stage" install --no-compile setuptools "torch==$(torch_version "$stage")" -r "$stage/requirements.txt" -c "$LOCK"
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

package_stamp() { (cd "$ROOT" && find plpython pyproject.toml -name '*.py' -o -name '*.[ch]' -o -name '*.toml' -o -name py.typed | sort | xargs sha256sum | sha256sum); }

check_python
STAMP="python $(python_version), torch $TORCH_VERSION, $(requirements dependencies | tr '\n' ' ')$(sha256sum <"$LOCK")"
is_stamped "$TARGET/dependencies.stamp" "$STAMP" || install_dependencies "$STAMP"
[ "${1:-}" != dependencies ] || exit 0  # an image keeps them as a layer of their own
STAMP=$(package_stamp)
is_stamped "$TARGET/package.stamp" "$STAMP" || install_package "$STAMP"
