#!/usr/bin/env bash
# Makes .venv with the whole stack, in the order that OpenMMLab needs: torch, build tools, mmcv from source, the rest.
# Usage: requirements/install.sh [VENV]   Settings: PYTHON (interpreter), TORCH (requirement of torch), MAX_JOBS
# Does nothing when VENV was already made from the same files.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}
torch=${TORCH:-torch==2.13.0}

fail() { echo "install: $*" >&2; exit 1; }

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.12 python3.11 python3.10 python; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.10 or newer is needed and was not found. Install it, or name it: make PYTHON=/path/to/python3 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
    || fail "$python is missing or older than Python 3.10. Name another one: make PYTHON=/path/to/python3 ..."
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python has no venv module (Debian and Ubuntu: apt-get install python3-venv)."
compiler=${CXX:-c++}
command -v "$compiler" >/dev/null 2>&1 || compiler=g++
command -v "$compiler" >/dev/null 2>&1 \
    || fail "a C++ compiler is needed to build mmcv and was not found (Debian and Ubuntu: apt-get install g++)."
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' \
    || fail "the headers of $python are missing (Debian and Ubuntu: apt-get install python3-dev)."

stamp="$venv/.mmptq-$(cat requirements/install.sh requirements/*.txt setup.py | "$python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest()[:16])')-${torch//[^a-zA-Z0-9.]/_}"
[ -f "$stamp" ] && exit 0

echo "install: making $venv (the first time takes 10 to 20 minutes: mmcv is built from source)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

# Without a GPU the CPU build of torch is enough, where the package index offers one. Only a CUDA build uses a GPU.
# mmcv 2.1.0 and mmengine import pkg_resources, which setuptools 81 dropped and which torch would upgrade to.
base=('setuptools<81' wheel ninja psutil packaging)
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    pip install --quiet "$torch" "${base[@]}"
else
    pip install --quiet "$torch+cpu" "${base[@]}" 2>/dev/null || pip install --quiet "$torch" "${base[@]}"
fi
if ! "$venv/bin/python" -c 'import mmcv.ops' 2>/dev/null; then
    MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$("$python" -c 'import os; print(os.cpu_count())')} \
        pip install --no-build-isolation 'mmcv==2.1.0'
fi
pip install --quiet -r requirements/stack.txt
pip install --quiet --no-build-isolation -e '.[test]'
if ! "$venv/bin/python" -c 'import triton' 2>/dev/null; then
    pip install --quiet -r requirements/triton.txt \
        || echo "install: no Triton for this platform: tests of the kernels for a GPU will be skipped" >&2
fi
rm -rf "$venv/timm"
pip install --quiet --no-deps --target "$venv/timm" -r requirements/timm.txt
"$venv/bin/python" -c 'import mmcv.ops, mmdet, mmseg, mmptq' || fail "the installed stack does not import, see above."
"$venv/bin/python" -W ignore -c 'from mmptq.backbones.timm_import import import_timm; import_timm()' \
    || echo "install: timm does not fit $torch (see above): tests of its models will be skipped" >&2
rm -f "$venv"/.mmptq-*
touch "$stamp"
echo "install: done"
