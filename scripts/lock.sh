#!/usr/bin/env bash
# lock.sh [--upgrade]: writes to constraints.txt, version by version, what pyproject.toml's packages bring along, for
# every Python from 3.11 on. Without --upgrade the versions that stand there stay where they can. torch is left to the
# Makefile, and sympy goes by torch; what else torch needs is named here.
source "$(dirname "$0")/lib.sh"

UV_VERSION=0.13.8
VENV=$(state_dir)/uv
TORCH_NEEDS=(filelock typing-extensions networkx jinja2 fsspec "mpmath<1.4" setuptools)

if [ ! -x "$VENV/bin/uv" ]; then
    "$PYTHON" -m venv "$VENV"
    "$VENV/bin/python" -m pip install "uv==$UV_VERSION"
fi
cd "$ROOT"
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cp constraints.txt "$WORK/lock"
printf '%s\n' "${TORCH_NEEDS[@]}" >"$WORK/torch.in"
SSL_CERT_FILE=${SSL_CERT_FILE:-${PIP_CERT:-}} "$VENV/bin/uv" pip compile -q pyproject.toml "$WORK/torch.in" --all-extras --universal \
    --no-header --no-annotate --no-emit-package torch --no-emit-package sympy -o "$WORK/lock" "$@" >/dev/null
# Linux goes without saying.
{ sed -n '/^#/p' constraints.txt; sed -e "s/ and sys_platform == 'linux'//g" -e "s/ ; sys_platform == 'linux'$//" "$WORK/lock"; } >"$WORK/new"
cp "$WORK/new" constraints.txt
