# Sourced by scripts/image.sh: a container engine. Docker where it runs, podman otherwise, installed if need be.
# shellcheck shell=bash

ENGINE_STATE=${ENGINE_STATE:-/var/tmp/pg_autoembed-engine}

engine_has_docker() { type docker >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# As a sandbox does: podman's own defaults ask for more and fail there, and so does the runtime that it prefers.
limits_are_fixed() { ! (ulimit -n 1048576) 2>/dev/null; }

install_podman() {
    say "podman, since no Docker runs here"
    as_root apt-get update -qq
    apt_install podman runc iptables netavark aardvark-dns containernetworking-plugins
}

configure_podman() {
    mkdir -p "$ENGINE_STATE"
    export CONTAINERS_CONF=$ENGINE_STATE/containers.conf
    cat >"$CONTAINERS_CONF" <<'CONF'
[containers]
default_ulimits = ["nofile=1024:20000", "nproc=4096:4096"]
[engine]
runtime = "runc"
CONF
}

# Sets ENGINE and BUILD_OPTIONS. HEALTHCHECK is no part of OCI's format.
find_engine() {
    ENGINE=docker BUILD_OPTIONS=()
    ! engine_has_docker || return 0
    ENGINE=podman BUILD_OPTIONS=(--format docker --layers)
    type podman >/dev/null 2>&1 || install_podman
    ! limits_are_fixed || { configure_podman; BUILD_OPTIONS+=(--isolation oci --network host); }
}

# podman's answer to Docker's interface, for testcontainers; ends with this script.
serve_engine() {
    [ "$ENGINE" = podman ] || return 0
    mkdir -p "$ENGINE_STATE"
    ENGINE_SOCKETS=$(mktemp -d "$ENGINE_STATE/service.XXXXXX")
    local socket=$ENGINE_SOCKETS/podman.sock log=$ENGINE_SOCKETS/log
    podman system service --time=0 "unix://$socket" 2>"$log" &
    ENGINE_SERVICE=$!
    export DOCKER_HOST=unix://$socket TESTCONTAINERS_RYUK_DISABLED=true TESTCONTAINERS_CONNECTION_MODE=docker_host
    for _ in $(seq 50); do
        [ ! -S "$socket" ] || return 0
        sleep 0.2
    done
    die "podman does not serve $socket: $(tail -n 3 "$log")"
}

stop_serving() {
    [ -n "${ENGINE_SERVICE:-}" ] || return 0
    kill "$ENGINE_SERVICE" 2>/dev/null || true
    rm -rf "$ENGINE_SOCKETS"
}
