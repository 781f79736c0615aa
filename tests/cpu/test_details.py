"""What sampled problems do not show: figures, NaN, threads, many heads, the arithmetic that really runs."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from support.helpers import Sizes, gradients, hf_eager, make_qkv, relative_error, visible
from support.helpers import expected as exact_attention
from torch import Tensor

from cpu.kernels import NARROW, NATIVE, TILES, Call, Kernel, Libraries, attend, check, differentiate, exact, problem_of
from softcap_runtime import AttentionConfig
from softcap_runtime.cpu import library as cpu_library
from softcap_runtime.engines.blocked_cpu import CpuProblem
from softcap_runtime.masks.intervals import RowIntervals, band, clipped, dense

KERNELS = pytest.mark.parametrize("kernel", [*NATIVE, *NARROW], ids=str)
HALF_KERNELS = pytest.mark.parametrize("kernel", NATIVE[2:], ids=str)
FLAGS = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
# It takes longer than the kernels, several of which compute the same call.
known = functools.cache(exact)
LIMITS = {torch.float32: (5e-7, 7e-7), torch.bfloat16: (2.5e-3, 3.5e-3), torch.float16: (1e-3, 1e-3)}


def everything(
    libraries: Libraries, kernel: Kernel, mask: RowIntervals, inputs: tuple[Tensor, ...], softcap: float | None = 50.0
) -> list[Tensor]:
    """Out, the logsumexp and the gradients of q, k and v, of q, k, v and grad_out."""
    q, k, v, grad_out = inputs
    problem = problem_of(q, k, mask, q.shape[-1] ** -0.5, softcap)
    out, lse = attend(libraries(kernel), problem, q, k, v)
    return [out, lse, *differentiate(libraries(kernel), problem, grad_out, q, k, v, out, lse)]


@functools.cache
def inputs_and_exact(
    dtype: torch.dtype, head_dim: int, seed: int
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, float]]]:
    """q, k, v and grad_out; and of out and each gradient what is exact and the error of eager model code.

    Kept, as they take longer than every kernel of the dtype does.
    """
    torch.manual_seed(seed)
    config = AttentionConfig(softcap=50.0, scale=head_dim**-0.5)
    sizes = Sizes(1, 8, 4, 512, 512, head_dim)
    inputs = (*make_qkv(sizes, dtype), make_qkv(sizes, dtype)[0])
    seen = visible(512, 512, causal=True, window=None)
    want_out, want = gradients(lambda *x: exact_attention(*x, config), inputs[:3], inputs[3])
    their_out, theirs = gradients(lambda *x: hf_eager(*x, config, seen), inputs[:3], inputs[3])
    pairs = zip((want_out, *want), (their_out, *theirs), strict=True)
    return inputs, [(right, relative_error(other, right)) for right, other in pairs]


@KERNELS
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_error_figures(libraries: Libraries, kernel: Kernel, head_dim: int, seed: int) -> None:
    """The stated limits, for inputs of unit variance; never above eager model code's errors."""
    inputs, wanted = inputs_and_exact(kernel.dtype, head_dim, seed)
    out, _, *grads = everything(libraries, kernel, band(512, 512, causal=True, window=None), inputs)
    forward, backward = LIMITS[kernel.dtype]
    limits = {"out": forward, "dq": backward, "dk": backward, "dv": backward}
    for (name, limit), got, (right, model) in zip(limits.items(), (out, *grads), wanted, strict=True):
        error = relative_error(got, right)
        print(f"{kernel} D{head_dim} {name}: {error:.2e}, eager model code {model:.2e}")
        assert error <= limit, name
        assert error <= model, name


@KERNELS
def test_more_heads_in_a_group_than_a_block_has_rows(libraries: Libraries, kernel: Kernel, seed: int) -> None:
    for group, q_len in ((80, 1), (80, 7), (129, 3)):
        mask = band(q_len, 70, causal=True, window=None)
        call = Call(Sizes(2, group, 1, q_len, 70, 40), mask, 0.2, 50.0, "fused", seed, 2)
        check(libraries(kernel), call, kernel.dtype, known(call, kernel.dtype))


@KERNELS
@pytest.mark.parametrize("threads", [2, 4, 7])
@pytest.mark.usefixtures("threads_back")
def test_two_runs_are_bit_equal(libraries: Libraries, kernel: Kernel, threads: int, seed: int) -> None:
    """However the scheduler deals the work out; and torch's number of threads may change between calls."""
    for sizes in (Sizes(1, 4, 2, 700, 700, 64), Sizes(1, 2, 1, 2, 5000, 64)):
        mask = band(sizes.q_len, sizes.kv_len, causal=True, window=None)
        inputs = (*make_qkv(sizes, kernel.dtype), make_qkv(sizes, kernel.dtype)[0])
        runs: dict[int, list[list[Tensor]]] = {1: [], threads: []}
        for _ in range(3):
            for count, made in runs.items():
                torch.set_num_threads(count)
                made.append(everything(libraries, kernel, mask, inputs))
        for first, *others in runs.values():
            assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))
        tolerance = 2e-6 if kernel.dtype == torch.float32 else 1e-2
        assert all(relative_error(a, b) <= tolerance for a, b in zip(runs[threads][0], runs[1][0], strict=True))


@KERNELS
@pytest.mark.parametrize("softcap", [50.0, 1000.0, None])
@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("place", ["q", "k"])
def test_nan_reaches_the_rows_that_see_it_and_no_other(
    libraries: Libraries, kernel: Kernel, softcap: float | None, rows: int, place: str, seed: int
) -> None:
    """Rows may be of several blocks, or few: then another path. (A NaN of v spoils rows beside those that see it, as it
    does in every formula that multiplies it by a weight of 0.)"""
    sizes = Sizes(2, 2, 1, rows, 200, 40)
    lo = torch.arange(rows, dtype=torch.int32)[None] * 200 // rows // 2
    mask = clipped(rows, 200, lo, lo + 60)
    inputs = (*make_qkv(sizes, kernel.dtype), make_qkv(sizes, kernel.dtype)[0])
    spoilt = [x.clone() for x in inputs]
    at, head = (rows - 1, 1) if place == "q" else (70, 0)
    spoilt["qk".index(place)][1, head, at, 7] = torch.nan
    clean, got = (everything(libraries, kernel, mask, tuple(x), softcap) for x in (inputs, spoilt))
    sees = torch.zeros(2, 2, rows, dtype=torch.bool)
    if place == "q":
        sees[1, 1, at] = True
    else:
        sees[1] = dense(mask, "cpu")[0, :, at]
    assert sees.any()
    assert not sees[1].all()
    for which in (0, 1):  # out, logsumexp
        assert bool(got[which][sees].isnan().all())
        assert torch.equal(got[which][~sees], clean[which][~sees])
    for mine, theirs in zip(got[2:], clean[2:], strict=True):
        assert bool(mine[1].isnan().any())
        assert torch.equal(mine[0], theirs[0])


@KERNELS
@pytest.mark.parametrize("rows", [3, 150])
@pytest.mark.parametrize("per_batch_row", [False, True])
@pytest.mark.parametrize("kind", ["band", "intervals"])
def test_what_no_row_sees_may_be_anything(
    libraries: Libraries, kernel: Kernel, rows: int, kind: str, per_batch_row: bool, seed: int
) -> None:
    """As the part of a cache that is not in use yet: its memory is nobody's."""
    sizes = Sizes(2, 4, 2, rows, 700, 40)
    if kind == "band":
        mask = RowIntervals(rows, 700, 37 - rows, 531 - rows, None, None)
        seen = [range(max(0, 37 - rows), 530)] * 2
    else:
        lo = torch.randint(37, 300, (2 if per_batch_row else 1, rows), dtype=torch.int32)
        mask = clipped(rows, 700, lo, lo + torch.randint(0, 230, lo.shape, dtype=torch.int32))
        seen = [range(int(mask.lo[b].min()), int(mask.hi[b].max())) for b in (0, -1)]
    inputs = (*make_qkv(sizes, kernel.dtype), make_qkv(sizes, kernel.dtype)[0])
    spoilt = [x.clone() for x in inputs]
    for x in spoilt[1:3]:
        for b in (0, 1):
            x[b, :, : seen[b].start], x[b, :, seen[b].stop :] = torch.nan, torch.nan
    clean, got = (everything(libraries, kernel, mask, tuple(x)) for x in (inputs, spoilt))
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, clean, strict=True))


@HALF_KERNELS
def test_the_arithmetic_that_is_asked_for_runs(libraries: Libraries, kernel: Kernel, seed: int) -> None:
    """Each rounds otherwise, so equal bits would mean that one is tested as another. (Pairs add as tiles do.)"""
    flag = {1: "", 2: "avx512_bf16", 3: "amx_bf16"}[kernel.arithmetic]
    if kernel.arithmetic == 1 or flag not in FLAGS or torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip(f"this CPU has no {flag}")
    sizes = Sizes(1, 4, 2, 100, 100, 64)
    inputs = (*make_qkv(sizes, kernel.dtype), make_qkv(sizes, kernel.dtype)[0])
    mask = band(100, 100, causal=True, window=None)
    mine, single = (everything(libraries, one, mask, inputs) for one in (kernel, NATIVE[2]))
    assert not torch.equal(mine[1], single[1])


@KERNELS
@pytest.mark.parametrize("layout", ["contiguous", "fused"])
def test_decoding_however_it_fetches(libraries: Libraries, kernel: Kernel, layout: str, seed: int) -> None:
    """A machine measures which way is fastest, so its other tests see one of them. Five key heads are more than are
    taken together."""
    for fetch, (head_dim, rows, keys) in itertools.product((0, 1, 2), ((64, 1, 300), (256, 3, 77), (40, 2, 515))):
        mask = band(rows, keys, causal=True, window=None)
        for heads, kv_heads in ((4, 2), (5, 5)):
            call = Call(Sizes(2, heads, kv_heads, rows, keys, head_dim), mask, 0.1, 50.0, layout, seed, 2)
            check(libraries(kernel)._replace(fetch=fetch), call, kernel.dtype, known(call, kernel.dtype))


def test_a_build_measures_what_multiplies_fastest(libraries: Libraries) -> None:
    from softcap_runtime.artifacts.lifecycle import Artifacts

    artifacts: Artifacts = libraries._artifacts
    assert artifacts.get(cpu_library.library()).arithmetic in range(1, TILES + 1)
    assert artifacts.get(cpu_library.library()).fetch in (0, 1, 2)
    for capability in ("AVX2", "DEFAULT"):
        assert artifacts.get(cpu_library.CpuLibrary(capability)).arithmetic == 1


def test_the_struct_is_the_headers() -> None:
    """The same fields in the same order, 8 bytes each: Python writes what C++ reads."""
    header = (Path(cpu_library.__file__).parent / "problem.h").read_text()
    kinds = {"int64_t": "q", "double": "d"}

    def fields(struct: str) -> list[tuple[str, str]]:
        (body,) = re.findall(rf"struct {struct} \{{(.*?)\}};", header, re.DOTALL)
        found = []
        for line in re.sub(r"//.*", "", body).split(";"):
            kind, _, names = line.strip().partition(" ")
            for name in names.replace(" ", "").split(",") if kind else []:
                inner = [(f"{name}_{one[0][0]}", one[1]) for one in fields("Strides")] if kind == "Strides" else None
                found += inner or [(name, kinds[kind])]
        return found

    strides = {"batch": "b", "head": "h", "row": "s"}
    wanted = [(re.sub(r"_r$", "_s", name), kind) for name, kind in fields("Problem")]
    assert [name for name, _ in fields("Strides")] == list(strides)
    assert wanted == [(name, "q" if kind._type_ in "lq" else kind._type_) for name, kind in CpuProblem._fields_]
