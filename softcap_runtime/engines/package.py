"""Packages: a graph goes in, the bytes of an AOTInductor package come out."""

from __future__ import annotations

import json
from collections.abc import Mapping

from softcap_runtime.artifacts import build
from softcap_runtime.artifacts.sources import digest
from softcap_runtime.compat.torch_private import Runner, load_package
from softcap_runtime.engines.spec import KernelSpec
from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store.fingerprint import fingerprint
from softcap_runtime.store.key import Key

BUILDER = "softcap_runtime.engines.graphs.builder"
# What a package comes from: the graphs, what they are made of, and what turns them into code.
SOURCES = (
    "engines/flex_cpu.py",
    "engines/graphs/builder.py",
    "engines/graphs/flex.py",
    "engines/graphs/softcap.py",
    "engines/spec.py",
    "masks/blocks.py",
    "compat/memory_file.py",
    "compat/torch_private.py",
)


class Package(KernelSpec):
    """A graph of ``graphs/`` compiled ahead of time for this CPU."""

    __slots__ = ()

    def key(self) -> Key:
        """See ``Artifact``."""
        return Key({**self._asdict(), "sources": digest(*SOURCES)}, fingerprint(self.device))

    def describe(self) -> KernelSpec:
        """See ``Artifact``."""
        return KernelSpec(*self)

    def build(self) -> bytes:
        """Export and compile it; see ``Artifact`` for what it raises."""
        environment = {
            # torch itself looks for g++ alone, and for no other where CXX is not there
            "CXX": build.wanted_compiler(self.op),
            # torch knows what this CPU can do; without this Inductor compiles a program to find out (6 s).
            "TORCHINDUCTOR_VEC_ISA_OK": "1",
        }
        return build.built_by_module(self.op, BUILDER, json.dumps(self._asdict()), "kernel.pt2", environment)

    def provenance(self) -> Mapping[str, str]:
        """The C++ compiler."""
        return {"compiler": build.compiler_version()}

    def load(self, data: bytes) -> Runner:
        """The package, ready to run; see ``Artifact`` for what it raises."""
        try:
            return load_package(data)
        except OSError as error:  # descriptors, memory, or the folder for temporary files: the package is good
            raise SoftcapRuntimeError(
                f"kernel {self.op} cannot be loaded now: {error}; give this process what it lacks and call again"
            ) from error
        except Exception as error:
            raise SoftcapRuntimeError(
                f"the package of kernel {self.op} does not load ({(str(error) or repr(error)).splitlines()[0]}); "
                "run: softcap-runtime clear"
            ) from error
