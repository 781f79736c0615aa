"""The document of ``inspect --json``: it holds what its model says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from softcap_runtime.report.cache import CacheReport, report
from softcap_runtime.store import Key, Store, fingerprint


@pytest.mark.parametrize("state", ["empty", "filled", "refused"])
def test_reports_can_be_read_back(tmp_path: Path, state: str) -> None:
    store = Store(tmp_path / "cache", 2**20)
    if state == "filled":
        store.load_or_build(Key({"name": "a", "n": 1, "flag": True}, fingerprint("cpu")), lambda: b"x")
    if state == "refused":
        (tmp_path / "cache").touch()
    made = report(store)
    document = json.loads(made.model_dump_json())
    assert CacheReport.model_validate(document, strict=True) == made
    assert set(document) == set(CacheReport.model_json_schema()["properties"])
    assert document["status"]["entries"] == (1 if state == "filled" else 0)
    assert (document["status"]["fault"] is not None) == (state == "refused")
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        CacheReport.model_validate({**document, "more": 1})
