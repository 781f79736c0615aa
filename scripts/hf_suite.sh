#!/usr/bin/env bash
# Hugging Face's own tests of models and generation, with softcap in place of sdpa:
#     bash scripts/hf_suite.sh CHECKOUT [MODEL ...] [-- arguments to pytest]
# CHECKOUT: a clone of transformers at the version to test; its own src/ is what runs. MODEL: gemma2 gemma3 vaultgemma
# t5gemma llama mistral when none is named. PYTHON: an environment that has this package and what those tests need
# (parameterized, datasets, accelerate, sentencepiece; .venv/bin/python when not set).
# Exit code 1 when a test fails with softcap that passes without.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
checkout="$(cd "${1:?which checkout of transformers?}" && pwd)"
shift
python="${PYTHON:-$here/../.venv/bin/python}"
unset "${!SOFTCAP_@}"  # the user's own settings are not under test
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}" PYTHONPATH="$checkout/src:$here/hf_suite"
exec "$python" "$here/hf_suite/compare.py" "$checkout" "$@"
