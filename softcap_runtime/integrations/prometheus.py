"""``/metrics`` for a runtime: a collector for prometheus_client (the extra ``prometheus``).

from prometheus_client import REGISTRY
REGISTRY.register(RuntimeCollector(Runtime.get()))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise ImportError(
        f"prometheus_client is needed ({error}); run: pip install 'softcap-runtime[prometheus]'"
    ) from None

if TYPE_CHECKING:
    from softcap_runtime.runtime import Runtime

_COUNTERS = {
    "hits": "Look-ups that found their plan: of calls, and of their backwards.",
    "misses": "Look-ups that had to make a plan.",
    "builds": "Kernels compiled by this process.",
    "loads": "Kernels that this process took from the cache.",
    "build_seconds": "Seconds spent on compiling kernels.",
    "load_seconds": "Seconds spent on loading kernels from the cache.",
}
_GAUGES = {
    "package_bytes": "Bytes of the loaded packages.",
    "mask_bytes": "Bytes of the masks that are kept.",
    "background_pending": "Builds that run behind calls.",
}


class RuntimeCollector(Collector):
    """The ``stats()`` of one runtime, read when it is scraped; names start with ``softcap_runtime_``."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client calls at each scrape."""
        stats = self._runtime.stats()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"softcap_runtime_{name}", text, value=getattr(stats, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"softcap_runtime_{name}", text, value=getattr(stats, name))
        failed = len(stats.background_failed)
        yield GaugeMetricFamily("softcap_runtime_background_failed", "Background builds that failed.", failed)
        fault = int(stats.cache_fault is not None)
        yield GaugeMetricFamily("softcap_runtime_cache_fault", "1 while the cache folder is not used.", fault)
        plans = GaugeMetricFamily(
            "softcap_runtime_plans", "Kinds of call that an engine serves.", labels=["engine", "reason"]
        )
        for row in stats.engines:
            plans.add_metric([row.engine, row.reason], row.plans)
        yield plans
