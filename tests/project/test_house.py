"""A newcomer finds the way: folders that can be taken in at a glance, modules that can be read at one sitting."""

from __future__ import annotations

import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "softcap_runtime"
MOST_ENTRIES = 14
MOST_LINES = 400


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """What the project holds, as paths from its root; ignored files are nobody's concern."""
    if not (ROOT / ".git").exists():
        pytest.skip("no list of what the project holds")
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
    return [Path(name) for name in listed if name and (ROOT / name).exists()]


def test_no_top_level_folder_is_crowded(tracked: list[Path]) -> None:
    """Entries as ``ls`` shows them. Not the package: its modules are import paths that callers use."""
    held: defaultdict[str, set[str]] = defaultdict(set)
    for folder, entry, *_ in (path.parts for path in tracked if len(path.parts) > 1):
        if not entry.startswith("."):
            held[folder].add(entry)
    assert {"docs", "scripts", "tests", PACKAGE} <= held.keys()
    del held[PACKAGE]
    crowded = {folder: sorted(entries) for folder, entries in held.items() if len(entries) > MOST_ENTRIES}
    assert not crowded


def test_no_module_of_the_package_is_long(tracked: list[Path]) -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in tracked if path.parts[0] == PACKAGE}
    assert len(lines) > 100
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}
