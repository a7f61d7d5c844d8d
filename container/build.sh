#!/bin/sh
# While the image is built. build.sh COMMAND…: with the pip configuration and the certificates that the build was lent, if
# any; neither gets into a layer. build.sh model NAME [SOURCE]: the model that the image carries.
set -eu

SECRETS=/run/secrets
[ ! -s $SECRETS/ca ] || export PIP_CERT=$SECRETS/ca SSL_CERT_FILE=$SECRETS/ca REQUESTS_CA_BUNDLE=$SECRETS/ca
[ ! -s $SECRETS/pip ] || export PIP_CONFIG_FILE=$SECRETS/pip
if [ -s $SECRETS/hf_token ]; then HF_TOKEN=$(cat $SECRETS/hf_token) && export HF_TOKEN; fi
export PIP_CACHE_DIR=/var/cache/pip # a mount of the build's, in no layer
# An empty build argument leaves the choice to the Makefile.
[ -n "${TORCH_VERSION:-}" ] || unset TORCH_VERSION
[ -n "${TORCH_INDEX:-}" ] || unset TORCH_INDEX

put_model() {
    mkdir -p /var/lib/pg_autoembed/models
    if [ -z "$1" ]; then echo "no model: mount a volume at /var/lib/pg_autoembed/models"
    elif [ -e /model/config.json ]; then autoembed model add /model --name "$1"
    elif [ -n "$2" ]; then autoembed model pull "$2" --name "$1"
    else scripts/model.sh "$1"; fi
}

case $1 in
    model) put_model "$2" "${3:-}" ;;
    *) exec "$@" ;;
esac
