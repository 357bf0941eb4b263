#!/usr/bin/env bash
# Install, check and measure on a machine with a GPU; needs no network, ends within 8 minutes.
#   bench/gpu.sh [FOLDER] [--dry-run]
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
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/triton} PYTHONUNBUFFERED=1

ready() { "$python" -c 'import psfast.objectives.batched, psfast.kernels' 2>/dev/null; }
if ! ready; then
    timeout 150 "$python" -m pip install --quiet --no-build-isolation --no-deps -e . || true
fi
if ! ready; then
    echo "pip could not install psfast; running from a copy of the sources" >&2
    rm -rf build/site
    mkdir -p build/site
    cp -r psfast build/site/psfast
    cp -r kernels build/site/psfast/kernels
    export PYTHONPATH=$PWD/build/site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m psfast.info || true
exec "$python" bench/gpu.py --out "$out" --seconds "$((430 - SECONDS))" "$@"
