"""The published JSON schema of ``inspect --json`` is the model's, and live reports keep to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import pytest

from softcap_runtime import store as package
from softcap_runtime.cache_report import CacheReport, report
from softcap_runtime.store import Key, Store, fingerprint

PUBLISHED = Path(package.__file__).parent / "status.schema.json"


def test_the_published_schema_is_the_models() -> None:
    """Set SOFTCAP_WRITE_SCHEMA=1 to publish a changed one."""
    schema = CacheReport.model_json_schema(mode="serialization")
    if os.environ.get("SOFTCAP_WRITE_SCHEMA") == "1":
        PUBLISHED.write_text(json.dumps(schema, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    assert json.loads(PUBLISHED.read_text(encoding="utf-8")) == schema


@pytest.mark.parametrize("state", ["empty", "filled", "refused"])
def test_reports_keep_to_it(tmp_path: Path, state: str) -> None:
    schema = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    store = Store(tmp_path / "cache", 2**20)
    if state == "filled":
        store.load_or_build(Key({"name": "a", "n": 1, "flag": True}, fingerprint("cpu")), lambda: b"x")
    if state == "refused":
        (tmp_path / "cache").touch()
    document = json.loads(report(store).model_dump_json())
    jsonschema.validate(document, schema)
    assert document["status"]["entries"] == (1 if state == "filled" else 0)
    assert (document["status"]["fault"] is not None) == (state == "refused")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "more": 1}, schema)
