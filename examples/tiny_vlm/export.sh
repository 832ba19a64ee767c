#!/usr/bin/env bash
# README's first command: sets up .venv, takes the bundled example model to a validated bundle with TensorRT-RTX engines,
# and asks it a question. Needs Python 3.11+, a C++17 compiler and CMake's usual build tools; no GPU.
#
#   bash examples/tiny_vlm/export.sh [BUNDLE]     (default: out/tiny_vlm)
set -euo pipefail
cd "$(dirname "$0")/../.."
bundle=${1:-out/tiny_vlm}

[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
echo "installing ecmfq_export and compiling its plugin library (a few minutes the first time)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check ".[rtx]"

.venv/bin/ecmfq-export export examples/tiny_vlm/checkpoint --data calib_data --target rtx --output "$bundle" \
    --evaluate examples/tiny_vlm/heldout/questions.jsonl

image=examples/tiny_vlm/heldout/images/000.png
echo "run: $image"
.venv/bin/ecmfq-export run "$bundle" --image "$image" --prompt "Describe the image."
