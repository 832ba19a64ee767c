#!/usr/bin/env bash
# Make the whole test bed: data, the four checkpoints (trained only where missing), and their stressed versions.
#   bash benchmarks/testbed/make.sh            # uses `python`; set PYTHON for another
set -euo pipefail
cd "$(dirname "$0")"
PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=1

[ -f data/test/manifest.json ] || "$PYTHON" make_data.py
for model in qwen_a qwen_b kimi_a kimi_b; do
    [ -f "checkpoints/$model/config.json" ] || "$PYTHON" train.py "$model" --resume
    for strength in mild strong; do
        "$PYTHON" stress.py "checkpoints/$model" -o "stressed/$model.$strength" --strength "$strength"
    done
done
