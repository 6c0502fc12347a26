#!/bin/sh
# Builds the TensorRT engine of this bundle on the board: ./build_engine.sh [options of `jpq-export build`]
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
python=${PYTHON:-python3}
if ! command -v "$python" >/dev/null 2>&1; then
    echo "build_engine.sh: $python not found; install it: sudo apt install python3 python3-pip" >&2
    exit 1
fi
if ! "$python" -c 'import numpy, click' 2>/dev/null; then
    echo "build_engine.sh: numpy or click not found; install them: $python -m pip install numpy click" >&2
    exit 1
fi
if ! "$python" -c 'import jpq_export' 2>/dev/null; then
    echo "build_engine.sh: jpq_export not found. On the machine that exported: pip wheel --no-deps jpq-export" >&2
    echo "(or in a checkout: pip wheel --no-deps .). Copy the jpq_export-*.whl here, then:" >&2
    echo "  $python -m pip install --no-deps jpq_export-*.whl     (TensorRT and the rest come with JetPack)" >&2
    exit 1
fi
exec "$python" -m jpq_export build "$here" "$@"
