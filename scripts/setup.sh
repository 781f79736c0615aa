#!/usr/bin/env bash
# Makes .venv in the checkout, with the pinned versions of constraints.txt; does nothing when it is up to date.
# PYTHON names the interpreter to make it from (default: python3); it must be 3.10 or newer.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python="${PYTHON:-python3}"
stamp=.venv/.setup
wanted="$(cat constraints.txt pyproject.toml | cksum) $PWD"

if [[ -x .venv/bin/python && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    exit 0
fi
if [[ ! -x .venv/bin/python ]]; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "setup: $python is missing or older than 3.10; set PYTHON to a newer interpreter" >&2
        exit 1
    fi
    "$python" -m venv .venv
fi
echo "setup: installing into .venv (the first time this downloads PyTorch)"
# No cache of pip's own: nothing is written outside the checkout and the folder for temporary files.
.venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check \
    -c constraints.txt -e '.[test,docs,transformers,plot,prometheus]'
echo "$wanted" >"$stamp"
