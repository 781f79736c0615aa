"""``python scripts/prewarm.py ...`` is ``softcap-runtime prewarm ...``."""

import sys

from softcap_runtime.cli import main

main(["prewarm", *sys.argv[1:]])
