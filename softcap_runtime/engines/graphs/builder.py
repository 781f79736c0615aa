"""The child process that compiles one kernel: ``python -m softcap_runtime.engines.graphs.builder SPEC_JSON FILE``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from softcap_runtime.compat.torch_private import count_threads_at_run_time, load_package
from softcap_runtime.engines.graphs.flex import flex_forward
from softcap_runtime.engines.spec import KernelSpec

# One translation unit is compiled per build: a precompiled header costs more than it saves. Products and sums may
# be contracted to fused multiply-adds, which round less often: the pointwise kernels take 8 % less time. Rows are not
# checked against the size that the mask's vectors have in the graph, which is not theirs: it takes 5 % more under a
# causal mask. An option that this torch does not have is left out.
INDUCTOR_OPTIONS = {
    "aot_inductor.precompile_headers": False,
    "assert_indirect_indexing": False,
    "cpp.dynamic_threads": True,
    "cpp.enable_floating_point_contract_flag": "fast",
}


def compile_package(spec: KernelSpec, target: str) -> None:
    """Export the graph of ``spec`` and write its AOTInductor package to ``target``."""
    import torch._dynamo.config
    from torch._inductor import aoti_compile_and_package, list_options

    # The fake-tensor cache of an export with symbolic strides refers to symbols of another trace (torch 2.13).
    torch._dynamo.config.fake_tensor_cache_enabled = False
    count_threads_at_run_time()
    known = set(list_options())
    options = {name: value for name, value in INDUCTOR_OPTIONS.items() if name in known}
    made = flex_forward(spec)
    with torch.no_grad():
        program = torch.export.export(made.module, made.example, dynamic_shapes=made.dynamic, strict=False)
        aoti_compile_and_package(program, package_path=target, inductor_configs=options)
    # Here and not first in the process that serves: with some pairs of torch and compiler a package crashes as it is
    # loaded (std::regex in torch 2.11's runtime, built by g++ 13).
    load_package(Path(target).read_bytes())


if __name__ == "__main__":
    compile_package(KernelSpec(**json.loads(sys.argv[1])), sys.argv[2])
