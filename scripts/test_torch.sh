#!/usr/bin/env bash
# The tests under another torch, in an environment of its own (.venv-VERSION):
#     bash scripts/test_torch.sh 2.8.0 [arguments to pytest]
# Packages come as the index has them for that torch, so on Linux with CUDA's libraries: some 6 GB.
# SOFTCAP_TEST_CACHE keeps the kernels for the next run. Tests of what that torch lacks are skipped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version="${1:?which torch? for example 2.8.0}"
shift
home=".venv-$version"
if [[ ! -f "$home/.ready" ]]; then
    "${PYTHON:-python3}" -m venv "$home"
    grep -v '^torch==' constraints.txt >"$home/constraints.txt"
    "$home/bin/python" -m pip install --quiet --no-cache-dir --disable-pip-version-check \
        -c "$home/constraints.txt" "torch==$version" -e '.[test]'
    touch "$home/.ready"
fi
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
export TMPDIR="$scratch" XDG_CACHE_HOME="$scratch/cache"
"$home/bin/python" -m pytest -p no:cacheprovider "$@"
