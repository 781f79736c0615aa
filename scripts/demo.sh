#!/usr/bin/env bash
# Sets everything up in .venv and runs the demo: a small Gemma-2 over real text, eager attention against ours.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec .venv/bin/python scripts/demo.py "$@"
