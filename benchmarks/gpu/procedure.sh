#!/usr/bin/env bash
# The whole procedure on a machine with a GPU, without a network, in under ten minutes:
#
#     benchmarks/gpu/procedure.sh DIR [MINUTES]        JSON goes to DIR ($OUT if DIR is missing); 8 minutes
#
# It wants Python 3.12 with torch and transformers, and the wheels that wheels.sh downloaded. They are unpacked into a
# folder of their own, so that the machine's Python stays as it is. Called again, it goes on with what is not done yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
out=${1:-${OUT:?give a folder for the results}}
minutes=${2:-8}
python=${PYTHON:-python3}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
mkdir -p "$out"

"$python" -m pip --disable-pip-version-check install --quiet --no-index --no-deps --no-compile --no-cache-dir \
  --target "$site" "$here"/wheels/*.whl
export PYTHONPATH="$root/hasten/src:$root/zoo/src:$site" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

status=0
timeout --signal=INT --kill-after=15 "$(("${minutes%.*}" * 60 + 75))" \
  "$python" "$here/run.py" --out "$out" --minutes "$minutes" "${@:3}" 2>"$out/errors.log" | tee "$out/run.log" ||
  status=$?
tail -n 20 "$out/errors.log" >&2
rm -rf "$out/training" "$out/training-data" # the averaged weights are in emoji-styles-weights.tar.gz
ls -l "$out"
exit "$status"
