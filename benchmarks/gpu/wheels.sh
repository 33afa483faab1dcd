#!/usr/bin/env bash
# Download the wheels of wheels.txt for CPython 3.12 on Linux, x86-64, into wheels/ beside this file (git ignores it).
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
platforms=()
for number in 2_17 2_24 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${number}_x86_64"); done
rm -rf "$here/wheels"
"${PYTHON:-python3}" -m pip --disable-pip-version-check download --quiet --no-deps --only-binary=:all: \
  --python-version 3.12 --implementation cp --platform manylinux2014_x86_64 "${platforms[@]}" \
  --dest "$here/wheels" --requirement "$here/wheels.txt"
if ls "$here/wheels" | grep -qi '^torch\|^nvidia\|^triton'; then
  echo "error: a wheel among them would replace the machine's torch" >&2
  exit 1
fi
bytes=$(du -sb "$here/wheels" | cut -f1)
echo "$(ls "$here/wheels" | wc -l) wheels, $((bytes >> 20)) MiB, in $here/wheels"
((bytes < 60 << 20)) || { echo "error: more than 60 MiB" >&2; exit 1; }
