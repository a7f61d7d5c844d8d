# Sourced by every script: what they all need to know. The variables come from the Makefile.
# shellcheck shell=bash
set -euo pipefail
umask 022
# pip says only what went wrong.
export PIP_QUIET=2 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VERSION=$(sed -n "s/^default_version = '\(.*\)'/\1/p" "$ROOT/pg_autoembed.control")
PYTHON=${PYTHON:-/usr/bin/python3}
# Versions of all packages, those included that others bring along.
# shellcheck disable=SC2034
LOCK=$ROOT/constraints.txt

say() { printf '==> %s\n' "$*" >&2; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
is_root() { [ "$(id -u)" = 0 ]; }

# Runs a command as root; an ordinary user needs sudo for it, a packager who fills a DESTDIR neither.
as_root() {
    if is_root || [ -n "${DESTDIR:-}" ]; then "$@"
    elif command -v sudo >/dev/null; then sudo -- "$@"
    else die "this step needs root, and there is no sudo: $*"; fi
}

# Runs a command as the user of the private server: PostgreSQL refuses to run as root.
as_server() {
    if is_root; then runuser -u postgres -- env HOME=/nonexistent "$@"; else "$@"; fi
}

# PG_CONFIG, else the newest of Debian's PostgreSQLs, else the one in PATH; empty if there is none.
find_pg_config() {
    local newest
    newest=$(printf '%s\n' /usr/lib/postgresql/*/bin/pg_config | sort -Vr | head -n1)
    if [ -n "${PG_CONFIG:-}" ]; then echo "$PG_CONFIG"
    elif [ -x "$newest" ]; then echo "$newest"
    else command -v pg_config || true; fi
}

# shellcheck disable=SC2034
use_postgres() {
    PG_CONFIG=$(find_pg_config)
    [ -x "$PG_CONFIG" ] || die "no PostgreSQL found: 'make install' gets it, or set PG_CONFIG"
    BINDIR=$("$PG_CONFIG" --bindir)
    SHAREDIR=$("$PG_CONFIG" --sharedir)
    PKGLIBDIR=$("$PG_CONFIG" --pkglibdir)
    SITE=$PKGLIBDIR/pg_autoembed/$VERSION
}

pg_major() { "$PG_CONFIG" --version | sed -E 's/^PostgreSQL ([0-9]+).*/\1/'; }
python_version() { "$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
site_packages() { echo "$SITE/lib/python$(python_version)/site-packages"; }

apt_install() {
    command -v apt-get >/dev/null || die "this machine has no apt: install these yourself: $*"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "$@" >/dev/null
}

# A compiler, and PostgreSQL's headers, makefiles and pg_regress.
need_build_tools() {
    { [ -f "$("$PG_CONFIG" --includedir-server)/postgres.h" ] && type gcc make >/dev/null 2>&1; } ||
        apt_install "postgresql-server-dev-$(pg_major)" gcc libc6-dev make "$@"
}

# One line a requirement, from a table of pyproject.toml: `dependencies`, or the extra `dev`.
requirements() {
    "$PYTHON" - "$ROOT/pyproject.toml" "$1" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
lists = {"dependencies": project["dependencies"], **project.get("optional-dependencies", {})}
print("\n".join(lists[sys.argv[2]]))
PY
}

# Succeeds if the stamp file holds this text already.
is_stamped() { [ "$(cat "$1" 2>/dev/null)" = "$2" ]; }

# The private server, its logs and the dev venv live in .pg/. Where the server's user cannot get at the checkout
# (a home of mode 0700), or its path is too long for a socket's name, .pg is a link to a directory in /var/tmp.
state_dir() {
    local link=$ROOT/.pg real
    real=$link
    if [ ${#link} -gt 70 ] || ! as_server test -x "$ROOT"; then
        real=/var/tmp/pg_autoembed-$(printf %s "$ROOT" | sha256sum | cut -c1-12)
    fi
    if [ "$(readlink -m "$link")" != "$real" ] || [ ! -d "$real" ]; then
        [ -L "$link" ] || [ ! -d "$link" ] || die "the server's user cannot get at $link any more: remove it, then run make again"
        rm -f "$link"
        mkdir -p "$real"
        [ "$real" = "$link" ] || ln -s "$real" "$link"
    fi
    [ -O "$real" ] || die "$real belongs to another user: run make as that user"
    echo "$real"
}
