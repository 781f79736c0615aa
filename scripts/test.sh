#!/usr/bin/env bash
# Everything that a change must pass: style, types, tests. Sets up .venv first; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh

# Triton runs and compiles the GPU kernels' tests without a GPU. Beside the environment, not in it: torch imports a
# Triton that it finds, at every start. Not every platform has a wheel; without it those tests are skipped.
triton=3.7.1
if [[ ! -d ".venv/triton/triton-$triton.dist-info" ]]; then
    .venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check --no-deps --upgrade \
        --target .venv/triton "triton==$triton" ||
        echo "test: Triton $triton can't be installed, the tests in tests/cuda/test_triton.py are skipped" >&2
fi

# What the tools and libraries write for themselves stays inside one temporary folder, gone at the end.
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export TMPDIR="$scratch" XDG_CACHE_HOME="$scratch/cache" XDG_CONFIG_HOME="$scratch/config" HF_HUB_OFFLINE=1
export TRITON_CACHE_DIR="$scratch/triton"
# Byte code is kept, whatever the environment says: tests start over a hundred processes, and each
# would compile this package.
export PYTHONDONTWRITEBYTECODE=

.venv/bin/ruff check .
.venv/bin/ruff format --check softcap_runtime tests scripts  # the snippets of the README are laid out by hand
.venv/bin/mypy
# xdist would begin with the files of the most tests: long ones of few tests would come last, where one worker is left
# alone with them.
how=(--numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations=10)
.venv/bin/python -m pytest "${how[@]}" "$@"
