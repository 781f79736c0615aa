"""``python -m softcap_runtime.cli``."""

from softcap_runtime.cli.main import main

main()
