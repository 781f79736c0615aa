"""What the command line reports about the cache: its state, its entries, why a key would miss, what is missing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.cpu.library import library
from softcap_runtime.engines.package import Package
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.report.gpus import Gpu, gpus
from softcap_runtime.store import Store, fingerprint, inspection
from softcap_runtime.store.entry import Sealed
from softcap_runtime.store.key import FieldValue
from softcap_runtime.store.report import EntryInfo, Explanation, Frozen, StoreStatus
from softcap_runtime.supply import Supply

Fields = Mapping[str, FieldValue]
OPS = ("attention", "flex_forward")
# What a field may be, by how it is written, and the words for that in an error. GPU kernels have keys of another form.
_KNOWN: dict[str, tuple[Mapping[str, FieldValue], str]] = {
    "op": ({op: op for op in OPS}, ", ".join(OPS)),
    "device": ({"cpu": "cpu"}, "cpu; inspect lists the kernels of a GPU"),
    "dtype": ({name: name for name in ("float32", "bfloat16", "float16")}, "float32, bfloat16 or float16"),
    "head_dim": ({}, "an integer"),
    "capped": ({"true": True, "false": False}, "true or false"),
}
# The fields that are not given, while the cache holds no package.
_DEFAULTS = Package("flex_forward", "cpu", "float32", 256, True)


class CacheReport(Frozen):
    """The document of ``inspect --json``; ``CacheReport.model_json_schema()`` gives its JSON schema.

    ``status``: the folder and the counters of all processes. ``fingerprint``: of this environment, for the CPU.
    ``entries``: least recently used first. ``gpus``: the CUDA devices here and the options of their kernels.
    """

    status: StoreStatus
    fingerprint: dict[str, str]
    entries: list[EntryInfo]
    gpus: list[Gpu]


def report(store: Store, softcap_approx: bool = False) -> CacheReport:
    """The state of ``store`` now. Never raises for what is on disk."""
    return CacheReport(
        entries=inspection.entries(store),  # first: what it rejects is counted in the status
        status=inspection.status(store),
        fingerprint=fingerprint("cpu"),
        gpus=gpus(store, softcap_approx),
    )


def explain(store: Store, words: Sequence[str]) -> Explanation:
    """Whether the kernel with some key fields (``["head_dim=256", "dtype=float32"]``) would be found, or why not.

    Without an op it is a flex package if the cache holds any, else the library, which depends on no other field.
    Fields that are not given are taken from the package that agrees with most of the given ones. Raises ValueError
    for a word that is no ``field=value`` of a kernel's key.
    """
    wanted = _parsed(words)
    packages: list[tuple[Fields, bool]] = [
        (info.fields, info.fits)
        for info in inspection.rows(store)[0]
        if set(info.fields) - {"sources"} == set(KernelSpec._fields)
    ]
    if wanted.get("op", "flex_forward" if packages else "attention") == "attention":
        return inspection.explain(store, library().key())
    packages = packages or [(_DEFAULTS._asdict(), True)]
    closest = max(packages, key=lambda one: (len(one[0].items() & wanted.items()), one[1]))[0]
    fields = {name: value for name, value in {**closest, **wanted}.items() if name != "sources"}
    return inspection.explain(store, Package(**fields).key())  # type: ignore[arg-type]


def missing(store: Store, artifacts: Iterable[Artifact]) -> list[Artifact]:
    """The ``artifacts`` that belong in the cache but are missing or unusable on disk."""
    keys = {one: one.key() for one in artifacts}
    return [one for one, key in keys.items() if key is not None and not _is_good(store, key.digest)]


def not_kept(supply: Supply) -> str | None:
    """Why kernels that this process built or loaded are no longer on disk, in one line.

    Either the size limit is too small for all of them, or another process removed them. None if all are there, or are
    held in memory because the disk cannot be written.
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
    # This process did not evict them: it evicts what it used last.
    clearing = f"another process removed them: it cleared the cache, or its SOFTCAP_CACHE_SIZE_LIMIT is below {needed}"
    return message + (store.fault or f"{clearing}; prewarm again")


def _is_good(store: Store, digest: str) -> bool:
    """Whether an entry is on disk and may be used."""
    return isinstance(store.examine(digest), Sealed)


def _parsed(words: Sequence[str]) -> dict[str, FieldValue]:
    wanted: dict[str, FieldValue] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or name not in _KNOWN:
            raise ValueError(f"--explain: {word!r}, expected field=value with {', '.join(_KNOWN)}")
        wanted[name] = _value(name, value)
    return wanted


def _value(name: str, text: str) -> FieldValue:
    if name == "head_dim" and text.isdecimal():
        return int(text)
    known, expected = _KNOWN[name]
    written = text.lower() if name == "capped" else text
    if written not in known:
        raise ValueError(f"--explain: {name}={text!r}, expected {expected}")
    return known[written]
