"""Compiles the Triton kernels for cards that need not be here, and prints what they take: a line of JSON a kernel."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from softcap_runtime.kernels import triton_backward, triton_decode, triton_forward
from softcap_runtime.kernels.gpu_options import BlockOptions, padded
from softcap_runtime.kernels.triton_launch import Layout, constants

KERNELS = {
    "forward": triton_forward.forward_kernel,
    "decode": triton_decode.decode_kernel,
    "dq": triton_backward.dq_kernel,
    "dkdv": triton_backward.dkdv_kernel,
    "dk": triton_backward.dkdv_kernel,
    "dv": triton_backward.dkdv_kernel,
}
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
SINGLE = ("Lse", "Shift", "Delta")
INTEGER = ("Lo", "Hi", "First", "Last")
REAL = ("inner", "coef", "bias", "reference", "gain")


def compiled(case: dict[str, Any]) -> dict[str, Any]:
    direction, dim, band = case["direction"], case["head_dim"], case["band"]
    dtype, options = getattr(torch, case["dtype"]), BlockOptions(*case["options"])
    kernel: Any = KERNELS[direction]
    if direction == "decode":
        options = options._replace(block_m=16)
    fixed = constants(dim, dtype, options, Layout(False, 8, True)) | {"ASM": True}
    form = 3 if dtype == torch.float32 else 1
    fixed |= {"BAND": band, "ONLINE": False, "FORM": form}
    fixed |= {"WANT_DK": direction != "dv", "WANT_DV": direction != "dk"}
    signature, known, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in fixed or (band and name in INTEGER):
            signature[name] = "constexpr"
            known[(place,)] = fixed.get(name)
        elif name in REAL:
            signature[name] = "fp32"
        elif name[0].isupper() and name not in ("Hq", "Hkv", "G", "Sq", "SqPad", "Skv"):
            pointed = "fp32" if name in SINGLE or (direction == "decode" and name == "Out") else NAMES[dtype]
            signature[name] = "*i32" if name in INTEGER else f"*{pointed}"
            attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    source = ASTSource(kernel, signature, known, attributes)
    major, minor = case["capability"]
    target = GPUTarget("cuda", 10 * major + minor, 32)
    made: Any = triton.compile(
        source, target=target, options={"num_warps": options.warps, "num_stages": options.stages}
    )
    assert made.asm["cubin"]
    return {"shared": made.metadata.shared, "columns": padded(dim)}


if __name__ == "__main__":
    for case in json.loads(sys.argv[1]):
        print(json.dumps(compiled(case)), flush=True)
