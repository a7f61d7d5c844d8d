#!/usr/bin/env bash
# Makes `create extension vector` possible: Debian's package where there is one, else built from Debian 13's source package.
source "$(dirname "$0")/lib.sh"
use_postgres

SOURCE_RELEASE=trixie

have_pgvector() { [ -f "$SHAREDIR/extension/vector.control" ]; }
have_build_tools() { [ -f "$("$PG_CONFIG" --includedir-server)/postgres.h" ] && type gcc make dpkg-source >/dev/null 2>&1; }

install_package() {
    local package
    package="postgresql-$(pg_major)-pgvector"
    apt-cache show "$package" >/dev/null 2>&1 && apt_install "$package" && have_pgvector
}

# The mirror that this machine already uses; apt's own configuration stays as it is.
debian_mirror() {
    # shellcheck disable=SC2016
    apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n1
}

fetch_source() {
    local dir=$1 mirror options
    mirror=$(debian_mirror)
    [ -n "$mirror" ] || die "no Debian mirror in this machine's apt sources: install pgvector 0.7 or newer yourself"
    echo "deb-src $mirror $SOURCE_RELEASE main" >"$dir/source.list"
    mkdir -p "$dir/lists/partial" "$dir/cache"
    options=(-qq -o "Dir::Etc::sourcelist=$dir/source.list" -o Dir::Etc::sourceparts=- -o APT::Sandbox::User=
        -o "Dir::State::lists=$dir/lists" -o "Dir::Cache=$dir/cache")
    (cd "$dir" && apt-get "${options[@]}" update && apt-get "${options[@]}" source pgvector >/dev/null)
}

# OPTFLAGS is empty: no -march=native, so that the library also runs on another machine.
build_from_source() {
    have_build_tools || apt_install "postgresql-server-dev-$(pg_major)" gcc libc6-dev make dpkg-dev
    WORK=$(mktemp -d)
    trap 'rm -rf "$WORK"' EXIT
    fetch_source "$WORK"
    make -s -C "$WORK"/pgvector-*/ OPTFLAGS="" PG_CONFIG="$PG_CONFIG" -j"${JOBS:-2}"
    as_root make -s -C "$WORK"/pgvector-*/ OPTFLAGS="" PG_CONFIG="$PG_CONFIG" install >/dev/null
}

have_pgvector && exit 0
say "pgvector for PostgreSQL $(pg_major)"
install_package || build_from_source
have_pgvector || die "pgvector is still missing in $SHAREDIR/extension"
