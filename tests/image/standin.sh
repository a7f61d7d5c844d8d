# Sourced by scripts/image.sh: the base image where there is no registry. FOR TESTS ALONE: a Debian 13 by debootstrap,
# and on it tests/image/base, Debian's PostgreSQL 17 with an entrypoint that behaves as the official image's does.
# shellcheck shell=bash

STANDIN_DEBIAN=localhost/pg_autoembed-test-debian:trixie
STANDIN_BASE=localhost/pg_autoembed-test-base:17-trixie

has_image() { "$ENGINE" image inspect "$1" >/dev/null 2>&1; }

# What slim images leave out; apt keeps no packages.
slim_down() {
    local root=$1
    echo 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin || true"; };' >"$root/etc/apt/apt.conf.d/keep-nothing"
    printf 'path-exclude /usr/share/%s/*\n' doc man locale >"$root/etc/dpkg/dpkg.cfg.d/slim"
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/usr/share/{doc,man,locale}/*
}

make_debian() {
    local root=$ENGINE_STATE/debian mirror
    is_root || die "a stand-in for Debian 13 takes debootstrap, and that takes root"
    say "a Debian 13 by debootstrap, since no registry can be reached"
    type debootstrap >/dev/null 2>&1 || { apt-get update -qq; apt_install debootstrap; }
    # shellcheck disable=SC2016
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 'Origin: Debian' 'Label: Debian' | head -n1)
    rm -rf "$root" && mkdir -p "$root"
    debootstrap --variant=minbase --include=ca-certificates trixie "$root" "$mirror" >"$ENGINE_STATE/debootstrap.log" 2>&1 ||
        die "debootstrap failed: $(tail -n 3 "$ENGINE_STATE/debootstrap.log")"
    slim_down "$root"
    tar -C "$root" -c . | "$ENGINE" import - "$STANDIN_DEBIAN" >/dev/null
    rm -rf "$root"
}

# Sets PG_IMAGE.
# shellcheck disable=SC2034,SC2153
use_standin() {
    mkdir -p "$ENGINE_STATE"
    has_image "$STANDIN_DEBIAN" || make_debian
    say "stand-in base $STANDIN_BASE, FOR TESTS ALONE"
    "$ENGINE" build -q "${BUILD_OPTIONS[@]}" --build-arg DEBIAN="$STANDIN_DEBIAN" -t "$STANDIN_BASE" \
        -f "$ROOT/tests/image/base/Containerfile" "$ROOT/tests/image/base" >/dev/null
    PG_IMAGE=$STANDIN_BASE
}
