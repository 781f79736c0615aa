"""The ``softcap-runtime`` command."""
