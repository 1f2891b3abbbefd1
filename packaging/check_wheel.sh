#!/usr/bin/env bash
# Installs a wheel as a user without a compiler does, and asks the packaged model: packaging/check_wheel.sh dist/*.whl [PYTHON ...]
#
# For every Python that is named, by default python3: a fresh environment, torch first (TORCH, by default torch), no
# compiler that could build anything, and outside the repository.
set -euo pipefail
wheel=$(realpath "$1")
shift
pythons=("${@:-python3}")
for python in "${pythons[@]}"; do
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  "$python" -m venv "$folder/venv"
  cd "$folder"
  "venv/bin/pip" install --quiet "${TORCH:-torch}"
  CC=false CXX=false "venv/bin/pip" install --quiet --only-binary :all: "$wheel"
  venv/bin/python - <<'CHECK'
import sys
from pathlib import Path

import kmixer
from kmixer import native

assert Path(kmixer.__file__).is_relative_to(sys.prefix), kmixer.__file__
assert native.kernels() is not None, "the kernels are not there"
print(sys.version.split()[0], Path(native.kernels()._name).name)
CHECK
  venv/bin/kmixer generate shakespeare-small-copy --prompt "KING:" --max-new-tokens 60 --seed 1
  cd - > /dev/null
  rm -rf "$folder"
done
