"""Compiles a Triton kernel ahead of time: no GPU is needed, and whoever launches the result needs no Triton.

As a child process: ``python -m softcap_runtime.cuda.triton.build CUBIN_SPEC_JSON FILE``.
"""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from softcap_runtime.cuda.cubin import Box, Cubin, CubinSpec
from softcap_runtime.cuda.machine_code import disassemble, overwritten_operands
from softcap_runtime.errors import BuildFailed

MODULES = {
    "forward_kernel": "cuda.triton.forward",
    "decode_kernel": "cuda.triton.decode",
    "combine_kernel": "cuda.triton.decode",
    "paged_kernel": "cuda.triton.paged",
    "dq_kernel": "cuda.triton.backward",
    "dkdv_kernel": "cuda.triton.backward",
    "query_hull_kernel": "cuda.triton.backward",
    "row_intervals_kernel": "cuda.triton.intervals",
    "statistics_kernel": "cuda.triton.backward",
    "gluon_forward_kernel": "cuda.gluon.forward",
    "gluon_dq_kernel": "cuda.gluon.dq",
    "gluon_dkdv_kernel": "cuda.gluon.dkdv",
}
# Kernels whose ``device_assert`` are compiled in: of what they are given, not of sums that leave int32.
_ASSERTING = ("row_intervals_kernel",)
_NUMBERS = {"i": "i32", "l": "i64", "f": "fp32"}
_BYTES = {"i": 4, "l": 8, "f": 4}
_PARAMETER = re.compile(r"\.param (?:\.align \d+ )?\.(\w+)(?: \.ptr[\w. ]*)? \w+_param_\d+(?:\[(\d+)\])?[,\n]")


def build(spec: CubinSpec) -> bytes:
    """The packed ``Cubin`` of ``spec``; BuildFailed, in one line, when Triton is missing, too old or fails."""
    try:
        compiled = _compile(spec)
        _check_machine_code(spec, compiled.asm["cubin"])
        return _packed(spec, compiled)
    except BuildFailed:
        raise
    except Exception as error:  # a compiler's errors are of any type
        line = (str(error).splitlines() or [""])[0]
        raise BuildFailed(
            f"kernel {spec.kernel}: Triton failed: {type(error).__name__}: {line}; a newer Triton may help"
        ) from error


def kernel_of(spec: CubinSpec) -> Any:
    """The function that Triton compiles; imports Triton."""
    module = importlib.import_module(f"softcap_runtime.{MODULES[spec.kernel]}")
    return getattr(module, spec.kernel)


def _compile(spec: CubinSpec) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = kernel_of(spec)
    gluon = MODULES[spec.kernel].startswith("cuda.gluon.")
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource  # no public name (Triton 3.7)
    types = [*spec.tensors, *(_NUMBERS[letter] for letter in spec.numbers)]
    constants = dict(spec.constants)
    signature, known, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        type_name = types[place] if place < len(types) else ""
        if gluon and type_name.startswith("tensordesc"):
            type_name = _with_layout(type_name)
        signature[name] = type_name or "constexpr"
        if not type_name:  # a compile-time argument, or a tensor that is left out: None
            known[(place,)] = constants.get(name)
        elif type_name.startswith("*") and spec.aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(kernel, signature, known, attributes),
        target=GPUTarget("cuda", spec.capability, 32),
        # Triton 3.10 will no longer fuse multiplications and additions by default.
        options={
            "num_warps": spec.warps, "num_stages": spec.stages, "enable_fp_fusion": True,
            "debug": spec.kernel in _ASSERTING, "sanitize_overflow": False,
        },
    )  # fmt: skip


def _check_machine_code(spec: CubinSpec, code: bytes) -> None:
    """BuildFailed for what ptxas is known to compile wrongly; not looked for where Triton has no disassembler."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    if spec.capability == 90 and tool.exists() and overwritten_operands(disassemble(code, tool)):
        raise BuildFailed(
            f"kernel {spec.kernel}: the ptxas of {_compiler()} overwrites operands of a product under way; "
            "use another Triton, or SOFTCAP_ENGINE=flex"
        )


def _with_layout(type_name: str) -> str:
    """A tile's type as Gluon spells it: with how it lies in shared memory, swizzled where it has several rows."""
    dtype, sizes = type_name.removeprefix("tensordesc<").removesuffix("]>").split("[")
    bits, rank = 32 if dtype in ("fp32", "i32") else 16, sizes.count(",") + 1
    swizzle = 0 if bits == 32 else 128
    layout = f"NVMMASharedLayout(swizzle_byte_width={swizzle}, element_bitwidth={bits}, rank={rank})"
    return f"tensordesc<{dtype}[{sizes}],{layout}>"


def _packed(spec: CubinSpec, compiled: Any) -> bytes:
    metadata = compiled.metadata
    # Triton 3.3 has no descriptors to tell of, 3.4 no memory for a profiler.
    descriptors = getattr(metadata, "tensordesc_meta", None) or ()
    memory = metadata.global_scratch_size + getattr(metadata, "profile_scratch_size", 0)
    boxes = [Box(tuple(one["block_size"]), one["swizzle"]) for one in descriptors]
    wanted = _parameter_bytes(spec)
    found = parameter_bytes(compiled.asm["ptx"])
    scratch = len(found) - len(wanted)
    # How Triton lays out a kernel's parameters is its own affair: what it did is read from its assembly, and nothing
    # is launched that disagrees.
    if found[: len(wanted)] != wanted or set(found[len(wanted) :]) - {8} or len(boxes) != _tiles(spec):
        raise BuildFailed(
            f"kernel {spec.kernel}: {_compiler()} passes parameters in a way that this version does not know; "
            "use another Triton"
        )
    if memory or metadata.num_ctas != 1:
        raise BuildFailed(f"kernel {spec.kernel}: {_compiler()} wants scratch memory or clusters for it")
    return Cubin(
        metadata.name, metadata.shared, 32 * metadata.num_warps, tuple(boxes), scratch, compiled.asm["cubin"]
    ).pack()


def _compiler() -> str:
    import triton

    return f"triton {triton.__version__}"


def _tiles(spec: CubinSpec) -> int:
    return sum(name.startswith("tensordesc") for name in spec.tensors)


def _parameter_bytes(spec: CubinSpec) -> list[int]:
    """The sizes of the parameters as ``cuda.driver`` passes them."""
    sizes: list[int] = []
    for name in spec.tensors:
        if name.startswith("tensordesc"):
            rank = name.count(",") + 1
            sizes += [128, *[4] * rank, *[8] * rank]  # the descriptor, its shape, its strides
        elif name:
            sizes.append(8)
    return sizes + [_BYTES[letter] for letter in spec.numbers]


def parameter_bytes(ptx: str) -> list[int]:
    """The sizes of the parameters of the kernel in a PTX text."""
    head = ptx[ptx.index(".entry") :]
    head = head[: head.index(")")]
    return [int(count) if count else int(kind[1:]) // 8 for kind, count in _PARAMETER.findall(head + "\n")]


if __name__ == "__main__":
    Path(sys.argv[2]).write_bytes(build(CubinSpec.of_json(sys.argv[1])))
