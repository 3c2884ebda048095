#!/usr/bin/env bash
# Makes the environment of the linters: torch and a few small packages, no mmcv, which takes ten minutes to build.
# Usage: requirements/lint.sh [VENV]   Settings: PYTHON (interpreter), TORCH (requirement of torch)
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv-lint}
torch=${TORCH:-torch==2.13.0}
stamp="$venv/.mmptq-$(cat requirements/lint.* | cksum | cut -d' ' -f1)"
[ -f "$stamp" ] && exit 0
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check install --quiet "$@"; }
pip "$torch+cpu" 2>/dev/null || pip "$torch"
pip -r requirements/lint.txt
rm -f "$venv"/.mmptq-*
touch "$stamp"
