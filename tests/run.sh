#!/usr/bin/env bash
# README's second command: sets up .venv-test and passes the tests (lint, then pytest). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

[ -x .venv-test/bin/python ] || "${PYTHON:-python3}" -m venv .venv-test
echo "installing ecmfq_export with its tests' needs and compiling its plugin library (a few minutes the first time)"
.venv-test/bin/python -m pip install --quiet --disable-pip-version-check ".[rtx,test]"

# The aarch64 library's tests need Debian's cross compiler and emulator; where they cannot be installed, those tests skip and say so.
if ! { command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64; } > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends -y g++-aarch64-linux-gnu qemu-user file; } \
        > /dev/null || echo "g++-aarch64-linux-gnu and qemu-user cannot be installed: tests of the aarch64 library will skip"
fi

.venv-test/bin/ruff check .
# A file stays with one worker, so that what its tests share (a bundle, a compiled emulator) is made once.
# One thread a worker: two workers on two cores would otherwise fight over four threads.
export OMP_NUM_THREADS=1
.venv-test/bin/python -m pytest -n 2 --dist loadfile --durations 15 "$@"
