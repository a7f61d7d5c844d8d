#!/usr/bin/env bash
# image.sh build: Dockerfile.postgres as $IMAGE. image.sh test [pytest's arguments]: its tests. image.sh suite [pytest's
# arguments]: the product's own, run by the image's PostgreSQL; without arguments those of its SQL. Both build it first.
# On the base that PG_IMAGE names, postgres:17-trixie unless said otherwise; where no registry can be reached, on the
# stand-in of tests/image/base, which is for tests alone, with Debian's torch, as $IMAGE-standin.
source "$(dirname "$0")/lib.sh"
source "$ROOT/tests/image/engine.sh"
source "$ROOT/tests/image/standin.sh"

IMAGE=${IMAGE:-pg_autoembed:$VERSION}
PG_IMAGE=${PG_IMAGE:-}
BASE=postgres:17-trixie
SQL_TESTS=(tests/test_{declare,embed,fill,triggers,search,views,privileges,sessions}.py -m "not slow")

find_base() {
    local said
    [ -z "$PG_IMAGE" ] || return 0
    if has_image "docker.io/library/$BASE" || said=$("$ENGINE" pull -q "docker.io/library/$BASE" 2>&1); then
        PG_IMAGE=docker.io/library/$BASE
    else
        say "$BASE cannot be pulled: $(tail -n1 <<<"$said")"
        use_standin
        IMAGE=$IMAGE-standin  # never to be taken for the image that compose.yaml starts
    fi
}

is_standin() { [ "$PG_IMAGE" = "$STANDIN_BASE" ]; }

# Given to the build as secrets: they get into no layer.
lent() {
    local certificates=${PIP_CERT:-${SSL_CERT_FILE:-}}
    [ ! -f "$certificates" ] || printf '%s\n' --secret "id=ca,src=$certificates"
    [ ! -f "${PIP_CONFIG_FILE:-}" ] || printf '%s\n' --secret "id=pip,src=$PIP_CONFIG_FILE"
}

build() {
    local options=("${BUILD_OPTIONS[@]}") name
    find_base
    # shellcheck disable=SC2034  # read by name below
    ! is_standin || TORCH_VERSION=system
    [ "$ENGINE" = podman ] || export DOCKER_BUILDKIT=1
    for name in PG_IMAGE TORCH_VERSION TORCH_INDEX MODEL MODEL_SOURCE; do
        [ -z "${!name+set}" ] || options+=(--build-arg "$name=${!name}")
    done
    [ -z "${MODEL_DIR:-}" ] || options+=(--build-context "model=$MODEL_DIR")
    say "image $IMAGE on $PG_IMAGE, by $ENGINE"
    # shellcheck disable=SC2046
    "$ENGINE" build "${options[@]}" $(lent) -t "$IMAGE" --build-arg "VERSION=$VERSION" --build-arg "REVISION=$(revision)" \
        -f "$ROOT/Dockerfile.postgres" "$ROOT"
    ! is_standin || say "$IMAGE stands on a stand-in base: FOR TESTS ALONE"
}

revision() { git -C "$ROOT" rev-parse HEAD 2>/dev/null || true; }

test_image() {
    serve_engine
    trap stop_serving EXIT
    cd "$ROOT"
    env AUTOEMBED_IMAGE="$IMAGE" AUTOEMBED_ENGINE="$ENGINE" AUTOEMBED_BUILD_OPTIONS="${BUILD_OPTIONS[*]}" PYTHONDONTWRITEBYTECODE=1 \
        "$(state_dir)/venv/bin/python" -m pytest -p no:cacheprovider --confcutdir=tests/image tests/image "$@"
}

# The tests make servers of their own, with the files of the image.
run_suite() {
    local options=("${BUILD_OPTIONS[@]}")
    mapfile -O "${#options[@]}" -t options < <(lent)
    "$ENGINE" build -q "${options[@]}" --build-arg "IMAGE=$IMAGE" -t "$IMAGE-suite" -f "$ROOT/tests/image/suite/Containerfile" "$ROOT" >/dev/null
    [ $# -gt 0 ] || set -- "${SQL_TESTS[@]}"
    "$ENGINE" run --rm --network none --shm-size 1g -v "$ROOT:/checkout:ro" "$IMAGE-suite" "$@"
}

find_engine
case ${1:-} in
    build) build ;;
    test) build && test_image "${@:2}" ;;
    suite) build && run_suite "${@:2}" ;;
    *) die "usage: image.sh build|test|suite" ;;
esac
