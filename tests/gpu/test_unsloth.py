"""The real unsloth on a GPU: a small Gemma-2 as unsloth runs it and under ``patch()``, in a process of their own.

Unsloth changes torch and transformers for the whole process, so ``support/unsloth_gemma2.py`` runs beside this one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

TESTS = Path(__file__).parents[1]
NEEDED = ("unsloth", "unsloth_zoo", "trl", "datasets", "bitsandbytes")
pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED), reason=f"needs {', '.join(NEEDED)}"
    ),
    pytest.mark.slow,
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("unsloth")
    command = [sys.executable, str(TESTS / "support" / "unsloth_gemma2.py"), str(folder / "results.json")]
    paths = [str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {"PYTHONPATH": os.pathsep.join(paths), "SOFTCAP_CACHE_DIR": str(cache_dir), "TMPDIR": str(folder)}
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=580)
    print(done.stdout[-20000:], done.stderr[-20000:])
    assert done.returncode == 0
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_every_part_ran(results: dict[str, Any]) -> None:
    assert results["failed"] == {"unsloth": [], "patched": []}


def test_our_functions_were_called(results: dict[str, Any]) -> None:
    assert results["masks"]["patched"] == ["BlockMask", "BlockMask"]
    for part in ("prefill", "generate", "generate padded", "train", "packed"):
        calls = results[f"{part}: calls"]["patched"]
        assert sum(count for name, count in calls.items() if name.startswith("ours")) > 0
        assert not any(name.startswith("unsloth") for name in calls)
        assert sum(results[f"{part}: engines"]["patched"].values()) > 0
    assert results["blocks"]["patched"]["failures"] == results["blocks"]["unsloth"]["failures"]


def test_losses(results: dict[str, Any]) -> None:
    theirs, ours = results["losses"]["unsloth"], results["losses"]["patched"]
    assert theirs[-1] < 0.95 * theirs[0]  # a run that learns nothing would agree with anything
    assert ours == pytest.approx(theirs, rel=2e-2)


def test_logits(results: dict[str, Any]) -> None:
    errors = [results[f"{mode}: relative error of logits"] for mode in ("unsloth", "patched")]
    assert errors[1] <= 1.5 * errors[0]
    assert results["after unpatch, largest difference of logits"] == 0


def test_generated_tokens(results: dict[str, Any]) -> None:
    """A tie may break either way in bfloat16, and all tokens after it differ."""
    for name in ("generated", "generated, padded"):
        assert results[f"{name}: agreement"] >= 0.5


def test_packed_documents_are_apart(results: dict[str, Any]) -> None:
    """Unsloth alone lets them see each other, and its trainer therefore doesn't pack Gemma-2."""
    assert results["packed"]["patched"] <= 0.05 < results["packed"]["unsloth"]
    assert results["supervised"]["patched"]["packing"]
    assert not results["supervised"]["unsloth"]["packing"]
    assert any(name.startswith("packed_seq_lengths") for name in results["supervised"]["patched"]["batch"])
