#!/usr/bin/env bash
# Install, check and measure on a machine with a GPU; needs no network.
#   bench/gpu.sh [FOLDER] [--dry-run] [--seconds S]
# writes gpu.json and gpu.txt into FOLDER (default bench/results). A second call reuses what
# the first has built: the extension and the compiled kernels.
set -euo pipefail
cd "$(dirname "$0")/.."

out=bench/results
if [[ $# -gt 0 && $1 != --* ]]; then
    out=$1
    shift
fi
python=${PYTHON:-python3}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton}

if ! "$python" -c 'import psfast, psfast.kernels' 2>/dev/null; then
    "$python" -m pip install --quiet --no-build-isolation --no-deps -e .
fi
"$python" -m psfast.info || true
exec "$python" bench/gpu.py --out "$out" "$@"
