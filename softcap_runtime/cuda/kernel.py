"""A GPU kernel on one device as an artifact: built by Triton in a child process, loaded by CUDA's driver."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

from softcap_runtime.artifacts import build
from softcap_runtime.artifacts.sources import digest
from softcap_runtime.cuda.cubin import Cubin, CubinSpec
from softcap_runtime.cuda.driver import LoadedCubin
from softcap_runtime.engines.spec import KernelSpec, MaskKind
from softcap_runtime.errors import SoftcapRuntimeError
from softcap_runtime.store.fingerprint import fingerprint, version_of
from softcap_runtime.store.key import Key

BUILDER = "softcap_runtime.cuda.triton.build"
# What machine code comes from: the kernels in Triton's language, and what compiles and packs them. Block sizes and the
# like are in ``CubinSpec``.
SOURCES = (
    "cuda/gluon/common.py",
    "cuda/gluon/dkdv.py",
    "cuda/gluon/dq.py",
    "cuda/gluon/forward.py",
    "cuda/gluon/series.py",
    "cuda/machine_code.py",
    "cuda/cubin.py",
    "cuda/triton/asm.py",
    "cuda/triton/backward.py",
    "cuda/triton/build.py",
    "cuda/triton/common.py",
    "cuda/triton/decode.py",
    "cuda/triton/forward.py",
    "cuda/triton/intervals.py",
    "cuda/triton/paged.py",
)


class GpuKernel(NamedTuple):
    """The kernel of ``spec`` on CUDA device ``device``."""

    spec: CubinSpec
    device: int

    def key(self) -> Key:
        """See ``Artifact``."""
        fields = {**self.spec.fields(), "sources": digest(*SOURCES)}
        return Key(fields, fingerprint("cuda", self.device))

    def describe(self) -> KernelSpec:
        """See ``Artifact``."""
        spec, known = self.spec, dict(self.spec.constants)
        mask: MaskKind = "" if "BAND" not in known else "band" if known["BAND"] else "intervals"
        head_dim, capped = int(known.get("D", 0)), known.get("FORM", 1) != 0
        return KernelSpec(spec.kernel, "cuda", spec.dtype, head_dim, capped, mask)

    def build(self) -> bytes:
        """Compile it; see ``Artifact`` for what it raises. No GPU is needed."""
        return build.built_by_module(self.spec.kernel, BUILDER, json.dumps(self.spec), "kernel.cubin")

    def provenance(self) -> Mapping[str, str]:
        """Triton's version."""
        return {"compiler": f"triton {version_of('triton')}"}

    def load(self, data: bytes) -> LoadedCubin:
        """The kernel, ready to be bound; see ``Artifact`` for what it raises."""
        try:
            return LoadedCubin(Cubin.unpack(data), self.device)
        except ValueError as error:
            raise SoftcapRuntimeError(str(error)) from error
