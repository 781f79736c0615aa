"""What the command line reports about the cache: its state, its entries, why a key would miss, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import library
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.report.gpus import Gpu, gpus
from softcap_runtime.store import Store, fingerprint
from softcap_runtime.store.entry import Sealed
from softcap_runtime.store.inspection import rows
from softcap_runtime.store.key import FieldValue
from softcap_runtime.store.report import EntryInfo, Explanation, Frozen, StoreStatus
from softcap_runtime.supply import Supply

Fields = Mapping[str, FieldValue]
OPS = ("attention", "flex_forward")
# The values of a field, and the words for them in an error. GPU kernels have keys of another form.
_KNOWN: dict[str, tuple[tuple[str, ...], str]] = {
    "op": (OPS, ", ".join(OPS)),
    "device": (("cpu",), "cpu; inspect lists the kernels of a GPU"),
    "dtype": (("float32", "bfloat16", "float16"), "float32, bfloat16 or float16"),
}
_FIELDS = KernelSpec._fields[:-1]  # a CPU kernel is for every mask
# Stands in for the fields that are not given while the cache holds no package.
_DEFAULTS = Package("flex_forward", "cpu", "float32", 256, True)


class CacheReport(Frozen):
    """The document of ``inspect --json``; ``CacheReport.model_json_schema()`` gives its JSON schema.

    ``status``: the folder and the counters of every process. ``fingerprint``: of this environment, for the CPU.
    ``entries``: least recently used first. ``gpus``: the CUDA devices here and the options of their kernels.
    """

    status: StoreStatus
    fingerprint: dict[str, str]
    entries: list[EntryInfo]
    gpus: list[Gpu]


def report(store: Store, softcap_approx: bool = False) -> CacheReport:
    """The state of ``store`` now. Never raises for what is on disk."""
    entries = store.entries()
    return CacheReport(
        status=store.status(), fingerprint=fingerprint("cpu"), entries=entries, gpus=gpus(store, softcap_approx)
    )


def explain(store: Store, words: Sequence[str]) -> Explanation:
    """Whether the kernel of some key fields (``["head_dim=256", "dtype=float32"]``) would be found, or why not.

    Without an op it is that of the cache's packages, where it holds any: all else depends on none of these fields.
    Fields that are not given are those of the package that agrees with most of the given ones. Raises ValueError
    for a word that is no ``field=value`` of a kernel's key.
    """
    wanted = _parsed(words)
    packages: list[tuple[Fields, bool]] = [
        (info.fields, info.fits) for info in rows(store)[0] if set(info.fields) - {"sources"} == set(KernelSpec._fields)
    ]
    if wanted.get("op", "flex_forward" if packages else "attention") == "attention":
        return store.explain(library().key())
    packages = packages or [(_DEFAULTS._asdict(), True)]
    closest = max(packages, key=lambda one: (_agreeing(one[0], wanted), one[1]))[0]
    fields = {name: value for name, value in {**closest, **wanted}.items() if name != "sources"}
    return store.explain(Package(**fields).key())  # type: ignore[arg-type]


def missing(store: Store, artifacts: Iterable[Artifact]) -> list[Artifact]:
    """Those of ``artifacts`` that belong in the cache but are missing or not usable on disk."""
    keys = {one: one.key() for one in artifacts}
    return [one for one, key in keys.items() if key is not None and not _is_good(store, key.digest)]


def not_kept(supply: Supply) -> str | None:
    """Why kernels that this process built or loaded are not on disk any more, in one line.

    The size limit is too small for all of them, or another process removed them. None when all are there, or wait in
    memory for a disk that can be written.
    """
    store = supply.store
    supplied = [(one.key(), how.bytes) for one, how in list(supply.supplied.items())]
    sizes = {key.digest: size for key, size in supplied if key is not None}
    gone = [digest for digest in sizes if not _is_good(store, digest)]
    if len(gone) <= store.held_in_memory:
        return None
    needed = sum(sizes.values())
    message = f"{len(gone)} of {len(sizes)} kernels did not stay in the cache: "
    if needed > store.size_limit:
        limit = f"SOFTCAP_CACHE_SIZE_LIMIT is {store.size_limit}; raise it and prewarm again"
        return f"{message}together they need {needed} bytes, {limit}"
    # This process did not evict them: what it used leaves last.
    clearing = f"another process removed them: it cleared the cache, or its SOFTCAP_CACHE_SIZE_LIMIT is below {needed}"
    return message + (store.fault or f"{clearing}; prewarm again")


def _is_good(store: Store, digest: str) -> bool:
    """Whether an entry is on disk and may be used."""
    return isinstance(store.examine(digest), Sealed)


def _agreeing(fields: Fields, wanted: Fields) -> int:
    return sum(fields.get(name) == value for name, value in wanted.items())


def _parsed(words: Sequence[str]) -> dict[str, FieldValue]:
    wanted: dict[str, FieldValue] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _FIELDS:
            raise ValueError(f"--explain: {word!r}, expected field=value with {', '.join(_FIELDS)}")
        wanted[name] = _value(name, value)
    return wanted


def _value(name: str, text: str) -> FieldValue:
    if name == "head_dim":
        if not text.isdecimal():
            raise ValueError(f"--explain: head_dim={text!r}, expected an integer")
        return int(text)
    if name == "capped":
        if text.lower() not in ("true", "false"):
            raise ValueError(f"--explain: capped={text!r}, expected true or false")
        return text.lower() == "true"
    known, expected = _KNOWN[name]
    if text not in known:
        raise ValueError(f"--explain: {name}={text!r}, expected {expected}")
    return text
