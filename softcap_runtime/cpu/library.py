"""The C++ sources of this folder as one library: compiled once per machine, loaded from memory, called by ctypes."""

from __future__ import annotations

import ctypes
import importlib.resources
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from softcap_runtime.artifacts import build
from softcap_runtime.artifacts.sources import digest
from softcap_runtime.compat.memory_file import MemoryFile
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store.fingerprint import fingerprint
from softcap_runtime.store.key import Key

MAIN = "attention.cpp"
HEADERS = (
    "ahead.h",
    "backward.h",
    "decode.h",
    "forward.h",
    "intervals.h",
    "packing.h",
    "pages.h",
    "problem.h",
    "products.h",
    "team.h",
    "vectors.h",
)
SOURCES = tuple(f"cpu/{name}" for name in (MAIN, *HEADERS))
# What torch calls a CPU's capability, and what the compiler may use for it. Any other is the machine's own: on
# processors other than x86-64 there is one.
_INSTRUCTIONS = {"DEFAULT": ["-march=x86-64"], "AVX2": ["-march=x86-64", "-mavx2", "-mfma", "-mf16c"]}
# Products and sums may be contracted to fused multiply-adds, which round less often.
_FLAGS = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-w",
]
# Run with the library's path in a process of its own: it shows that the library loads, and measures.
_PROBE = (
    "import ctypes, sys\n"
    "try: ctypes.CDLL('libgomp.so.1', ctypes.RTLD_GLOBAL)\n"
    "except OSError: pass\n"
    "library = ctypes.CDLL(sys.argv[1])\n"
    "print(library.softcap_arithmetic(), library.softcap_fetch(), file=open(sys.argv[2], 'w'))"
)


class Library(NamedTuple):
    """The loaded library. ``forward``, ``paged`` and ``backward`` take addresses, ``intervals`` numbers too: see
    attention.cpp.

    As its build measured on this machine, ``arithmetic``: what multiplies bfloat16 fastest (1 float32, 2 pairs, 3
    tiles); ``fetch``: how decoding fetches keys and values fastest (see Fetch in ahead.h).
    """

    forward: Any
    paged: Any
    backward: Any
    intervals: Any
    arithmetic: int
    fetch: int


class CpuLibrary(NamedTuple):
    """The artifact: all kernels of the CPU, for ``capability``, torch's name of what this process may use."""

    capability: str

    def key(self) -> Key:
        """See ``Artifact``."""
        fields = {"op": "attention", "device": "cpu", "capability": self.capability, "sources": digest(*SOURCES)}
        return Key(fields, fingerprint("cpu"))

    def describe(self) -> KernelSpec:
        """See ``Artifact``."""
        return KernelSpec("attention", "cpu", "", 0, True)

    def build(self) -> bytes:
        """Compile and try it; see ``Artifact`` for what it raises."""
        name, compiler = "attention", build.wanted_compiler("attention")
        compiled = build.built_by(name, lambda folder: _compile(compiler, self.capability, folder), "kernel.o")
        library = build.built_by(name, lambda folder: _link(compiler, compiled, folder), "kernel.so")

        def probe(folder: Path) -> Sequence[str]:
            (folder / "kernel.so").write_bytes(library)
            return [sys.executable, "-I", "-c", _PROBE, str(folder / "kernel.so"), str(folder / "measured")]

        arithmetic, fetch = map(int, build.built_by(name, probe, "measured").split())
        return json.dumps({"arithmetic": arithmetic, "fetch": fetch}).encode() + b"\n" + library

    def provenance(self) -> Mapping[str, str]:
        """The C++ compiler."""
        return {"compiler": build.compiler_version()}

    def load(self, data: bytes) -> Library:
        """The library, from a file in memory; see ``Artifact`` for what it raises."""
        line, _, code = data.partition(b"\n")
        try:
            measured = json.loads(line)
            arithmetic, fetch = int(measured["arithmetic"]), int(measured["fetch"])
        except (KeyError, TypeError, ValueError):
            raise SoftcapRuntimeError(
                "the library of kernel attention is not what this version writes; run: softcap-runtime clear"
            ) from None
        try:
            with MemoryFile(code) as path:
                loaded = _loaded(path)
            forward, paged, backward = loaded.softcap_forward, loaded.softcap_paged, loaded.softcap_backward
            intervals = loaded.softcap_intervals
        except (OSError, AttributeError) as error:
            raise SoftcapRuntimeError(
                f"kernel attention cannot be loaded: {error}; raise this process's limits if it is out of file "
                "descriptors or memory, else run: softcap-runtime clear"
            ) from error
        for function, count in ((forward, 9), (paged, 9), (backward, 13)):
            function.argtypes, function.restype = [ctypes.c_void_p] * count, ctypes.c_int64
        tokens: list[type[ctypes._SimpleCData[Any]]] = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
        intervals.argtypes = [*tokens, *tokens, *[ctypes.c_int64] * 5, *[ctypes.c_void_p] * 2]
        intervals.restype = ctypes.c_int64
        return Library(forward, paged, backward, intervals, arithmetic, fetch)


def library() -> CpuLibrary:
    """The artifact for this process."""
    return CpuLibrary(torch.backends.cpu.get_cpu_capability())


def _compile(compiler: str, capability: str, folder: Path) -> Sequence[str]:
    """The command that compiles the sources, which it puts into ``folder``."""
    package = importlib.resources.files("softcap_runtime.cpu")
    for name in (MAIN, *HEADERS):
        (folder / name).write_bytes((package / name).read_bytes())
    x86 = os.uname().machine == "x86_64"
    target = _INSTRUCTIONS.get(capability, ["-march=native"]) if x86 else ["-mcpu=native"]
    return [compiler, *_FLAGS, *target, "-c", MAIN, "-o", "kernel.o"]


def _link(compiler: str, compiled: bytes, folder: Path) -> Sequence[str]:
    """The command that makes a library of the compiled sources."""
    (folder / "kernel.o").write_bytes(compiled)
    # OpenMP's functions are left open: in a process they are torch's own, so that both use the same threads. Clang
    # calls a runtime of its own, which torch does not bring.
    openmp = ["-fopenmp"] if "clang" in os.path.basename(compiler) else []
    return [compiler, "-shared", *openmp, "kernel.o", "-o", "kernel.so"]


def _loaded(path: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(path)
    except OSError:  # a torch whose OpenMP is not there for all: the system's
        ctypes.CDLL("libgomp.so.1", ctypes.RTLD_GLOBAL)
        return ctypes.CDLL(path)
