"""More than one CUDA device: inputs on one that is not current, threads on each, processes on each."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.data_parallel import CONFIG, WORLD, train
from torch import Tensor

from softcap_runtime import AttentionConfig, PrewarmRequest, Runtime, RuntimeSettings

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
# Lengths (queries, keys): a decoding step, a call by tensor maps.
SHAPES = [(1, 300), (1024, 1024)]


def inputs(rows: int, keys: int, dim: int = 64) -> list[Tensor]:
    sizes = ((8, rows), (4, keys), (4, keys))
    return [torch.randn(2, heads, n, dim, dtype=torch.bfloat16) for heads, n in sizes]


def on(device: int, qkv: list[Tensor]) -> list[Tensor]:
    return [x.to(torch.device("cuda", device)).requires_grad_() for x in qkv]


def step(runtime: Runtime, qkv: list[Tensor], config: AttentionConfig = CONFIG) -> list[Tensor]:
    """The output and the gradients of its sum, on the CPU."""
    out = runtime.attention(*qkv, config)
    grads = torch.autograd.grad(out.float().sum(), qkv)
    assert {x.device for x in (out, *grads)} == {qkv[0].device}
    return [x.cpu() for x in (out.detach(), *grads)]


def same(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(("rows", "keys"), SHAPES)
def test_inputs_on_a_device_that_is_not_current(runtimes: dict[str, Runtime], rows: int, keys: int, seed: int) -> None:
    qkv = inputs(rows, keys)
    with torch.cuda.device(0):
        want = step(runtimes["auto"], on(0, qkv))
        with torch.no_grad():  # by other kernels than those of training
            want_out = runtimes["auto"].attention(*on(0, qkv), CONFIG).cpu()
        for device in (1, 0, 1):
            assert same(step(runtimes["auto"], on(device, qkv)), want)
            with torch.no_grad():
                assert torch.equal(runtimes["auto"].attention(*on(device, qkv), CONFIG).cpu(), want_out)
            assert torch.cuda.current_device() == 0


def test_a_document_mask_on_each_device(runtimes: dict[str, Runtime], seed: int) -> None:
    qkv, ids = inputs(512, 512), torch.arange(512).div(100, rounding_mode="floor").expand(2, -1)
    got = [runtimes["auto"].attention(*on(n, qkv), CONFIG, document_ids=ids.to(f"cuda:{n}")) for n in (0, 1)]
    assert torch.equal(got[0].cpu(), got[1].cpu())


def test_inputs_on_two_devices_are_refused(runtimes: dict[str, Runtime], seed: int) -> None:
    q, k, v = inputs(64, 64)
    with pytest.raises(ValueError, match="cuda:1"):
        runtimes["auto"].attention(q.to("cuda:0"), k.to("cuda:1"), v.to("cuda:1"), CONFIG)


def test_a_thread_for_each_device(runtimes: dict[str, Runtime], seed: int) -> None:
    """As ``torch.nn.DataParallel`` runs a model's replicas."""
    qkv = inputs(512, 512)
    want = step(runtimes["auto"], on(0, qkv))
    wrong: list[str] = []
    start = threading.Barrier(4)

    def work(device: int, chosen: bool) -> None:
        if chosen:
            torch.cuda.set_device(device)
        mine = on(device, qkv)
        start.wait()
        for _ in range(20):
            if not same(step(runtimes["auto"], mine), want):
                wrong.append(f"device {device}")

    threads = [threading.Thread(target=work, args=(n, chosen)) for n in (0, 1) for chosen in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not dist.is_nccl_available(), reason="this torch has no NCCL")
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(tmp_path: Path, kind: str, seed: int) -> None:
    runtime = Runtime(RuntimeSettings(cache_dir=tmp_path / "cache"))
    request = PrewarmRequest(
        config=CONFIG, num_heads=4, num_kv_heads=2, head_dim=64, dtype="float32", device="cuda", train=True
    )
    runtime.prewarm([request], progress=False)
    arguments = ((kind,), "cuda", str(tmp_path / "store"), str(tmp_path / "cache"), seed)
    mp.spawn(train, arguments, nprocs=WORLD)
