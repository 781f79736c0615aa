"""``python scripts/inspect_cache.py ...`` is ``softcap-runtime inspect ...``."""

import sys

from softcap_runtime.cli import main

main(["inspect", *sys.argv[1:]])
