#!/usr/bin/env bash
# Stops the private server and removes it with all that make built in the checkout.
source "$(dirname "$0")/lib.sh"

[ ! -e "$ROOT/.pg/server" ] || "$ROOT/scripts/server.sh" down
REAL=$(readlink -m "$ROOT/.pg")
rm -rf "$REAL" "$ROOT/.pg" "$ROOT/build"
