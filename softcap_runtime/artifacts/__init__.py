"""Artifacts are built once per machine and kept: a source, a toolchain and a key, with one life cycle for all kinds."""
