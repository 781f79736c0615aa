"""``python scripts/prewarm.py ...`` is ``softcap-runtime prewarm ...``."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # nothing needs to be installed

from softcap_runtime.cli.main import main

main(["prewarm", *sys.argv[1:]])
