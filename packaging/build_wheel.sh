#!/usr/bin/env bash
# The wheel of this platform, for every Python, into dist/: packaging/build_wheel.sh
#
# Its kernels hold nothing of Python and need no OpenMP runtime (native/threads.h), so that one file serves all. On Linux
# auditwheel says which systems it runs on, and the wheel is named by that. Needs a C++ compiler, and the packages build
# and auditwheel.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
built=$(mktemp -d)
trap 'rm -rf "$built"' EXIT
"$python" -m build --wheel --outdir "$built"
wheel=("$built"/kmixer-*-py3-none-*.whl)
for build in generic $([ "$(uname -m)" = x86_64 ] && echo avx2 avx512 avx512bf16); do
  "$python" -m zipfile -l "${wheel[0]}" | grep -q "kmixer/native/_kernels_$build.so" ||
    { echo "error: no _kernels_$build.so in the wheel: the compiler failed; see the output above"; exit 1; }
done
mkdir -p dist
if [ "$(uname -s)" = Linux ]; then
  "$python" -m auditwheel repair --wheel-dir dist "${wheel[0]}"
else
  cp "${wheel[0]}" dist
fi
ls -l dist/kmixer-*.whl
