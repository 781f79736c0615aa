"""The Prometheus collector tells what ``stats()`` says at each scrape."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from softcap_runtime import AttentionConfig, Runtime, RuntimeSettings

prometheus_client = pytest.importorskip("prometheus_client")

from softcap_runtime.integrations.prometheus import RuntimeCollector  # noqa: E402


def test_a_scrape_is_the_stats(tmp_path: Path, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path, engine="eager"))
    registry = prometheus_client.CollectorRegistry()
    registry.register(RuntimeCollector(runtime))
    assert registry.get_sample_value("softcap_runtime_hits_total") == 0
    q = torch.randn(1, 2, 5, 16)
    for _ in range(4):
        runtime.attention(q, q, q, AttentionConfig(scale=0.25))
    stats = runtime.stats()
    for name in ("hits", "misses", "builds", "loads", "build_seconds", "load_seconds"):
        assert registry.get_sample_value(f"softcap_runtime_{name}_total") == getattr(stats, name)
    for name in ("package_bytes", "mask_bytes", "background_pending", "background_failed", "cache_fault"):
        assert registry.get_sample_value(f"softcap_runtime_{name}") == 0
    labels = {"engine": "eager", "reason": "asked for"}
    assert registry.get_sample_value("softcap_runtime_plans", labels) == 1
    assert b"softcap_runtime_hits_total 3.0" in prometheus_client.generate_latest(registry)


def test_without_prometheus_client_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client.core", None)
    monkeypatch.delitem(sys.modules, "softcap_runtime.integrations.prometheus")
    with pytest.raises(ImportError, match=r"run: pip install 'softcap-runtime\[prometheus\]'$"):
        importlib.import_module("softcap_runtime.integrations.prometheus")
