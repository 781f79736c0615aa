"""``patch`` on stand-ins: modules with unsloth's names, which import from each other as those of 2026.10.9 do.

The package itself needs a GPU to be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM, Sizes, expected, make_qkv, relative_error
from torch import Tensor

import softcap_runtime
from softcap_runtime import AttentionConfig
from softcap_runtime.integrations.unsloth import patch, unpatch

FUNCTIONS = ("slow_attention_softcapping", "slow_inference_attention_softcapping")
CREATE = ("create_flex_attention_causal_mask", "create_flex_attention_sliding_window_mask")
LAYER = SimpleNamespace(config=SimpleNamespace(attn_logit_softcapping=30.0, query_pre_attn_scalar=64))
SOURCES = {
    "unsloth": "__version__ = '2026.10.9'",
    "unsloth.kernels.flex_attention": """
HAS_FLEX_ATTENTION = False
def slow_attention_softcapping(Q, K, V, causal_mask, self, bsz, q_len): return "unsloth's"
def slow_inference_attention_softcapping(Q, K, V, causal_mask, self, bsz, kv_len): return "unsloth's"
create_flex_attention_causal_mask = create_flex_attention_sliding_window_mask = None
""",
    "unsloth.kernels": "from unsloth.kernels.flex_attention import *",
    "unsloth.utils": "",
    "unsloth.utils.packing": """
def get_packed_info_from_kwargs(kwargs, device, position_ids=None): return kwargs.get("packed")
""",
    "unsloth.models": "",
    "unsloth.models.llama": """
from unsloth.kernels import *
from unsloth.utils.packing import get_packed_info_from_kwargs
""",
    "unsloth.models.gemma2": """
from unsloth.models.llama import *
from unsloth.utils.packing import get_packed_info_from_kwargs
def forward(Q, K, V, causal_mask, layer, generating=False, **kwargs):
    get_packed_info_from_kwargs(kwargs, Q.device)
    fx = slow_inference_attention_softcapping if generating else slow_attention_softcapping
    return fx(Q, K, V, causal_mask, layer, Q.shape[0], K.shape[2])
""",
    "unsloth.trainer": "PADDING_FREE_BLOCKLIST = {'gemma2', 'gpt_oss'}",
}


@pytest.fixture
def unsloth(own_runtime: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    modules = {}
    for name, source in SOURCES.items():
        module = modules[name] = ModuleType(name)
        module.__path__ = []  # a package
        monkeypatch.setitem(sys.modules, name, module)
        exec(source, vars(module))
    yield modules
    unpatch()


def bound(modules: dict[str, ModuleType]) -> dict[str, Any]:
    """Everything that the modules hold, but what makes them modules."""
    return {
        f"{place}.{name}": value
        for place, module in modules.items()
        for name, value in vars(module).items()
        if not name.startswith("__")
    }


def test_everywhere_and_back_again(unsloth: dict[str, ModuleType]) -> None:
    before = bound(unsloth)
    replaced = patch()
    for place in ("kernels.flex_attention", "kernels", "models.llama", "models.gemma2"):
        module = unsloth[f"unsloth.{place}"]
        for name in CREATE:
            assert getattr(module, name) is getattr(softcap_runtime, name)
        assert module.HAS_FLEX_ATTENTION is softcap_runtime.HAS_FLEX_ATTENTION
        for name in ("HAS_FLEX_ATTENTION", *FUNCTIONS, *CREATE):
            assert f"unsloth.{place}.{name}" in replaced
            assert getattr(module, name) is not before[f"unsloth.{place}.{name}"]
    # Only the layer's own question about packed sequences is listened to.
    packed = [name for name in replaced if name.endswith("get_packed_info_from_kwargs")]
    assert packed == ["unsloth.models.gemma2.get_packed_info_from_kwargs"]
    assert "gemma2" not in unsloth["unsloth.trainer"].PADDING_FREE_BLOCKLIST
    assert patch() == []
    assert sorted(unpatch()) == sorted(replaced)
    assert bound(unsloth) == before
    assert "gemma2" in unsloth["unsloth.trainer"].PADDING_FREE_BLOCKLIST
    assert unpatch() == []


def test_a_module_that_is_imported_later(unsloth: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    patch()
    late = ModuleType("unsloth.models.late")
    exec("from unsloth.models.llama import *", vars(late))
    monkeypatch.setitem(sys.modules, late.__name__, late)
    assert late.create_flex_attention_causal_mask is softcap_runtime.create_flex_attention_causal_mask
    unpatch()
    assert late.create_flex_attention_causal_mask is None
    assert late.slow_attention_softcapping(*[None] * 7) == "unsloth's"


@pytest.mark.parametrize("generating", [False, True])
def test_the_layer(unsloth: dict[str, ModuleType], generating: bool, seed: int) -> None:
    patch()
    gemma2 = unsloth["unsloth.models.gemma2"]
    masks = {
        None: gemma2.create_flex_attention_causal_mask(96),
        16: gemma2.create_flex_attention_sliding_window_mask(96, 16),
    }
    for q_len, kv_len in ((40, 40), (5, 50), (1, 50)):
        q, k, v = make_qkv(Sizes(2, 4, 2, q_len, kv_len))
        for window, mask in masks.items():
            out = gemma2.forward(q, k, v, mask, LAYER, generating)
            assert relative_error(out, wanted(q, k, v, window)) <= 2e-6


@pytest.mark.parametrize("generating", [False, True])
def test_packed_sequences(unsloth: dict[str, ModuleType], generating: bool, seed: int) -> None:
    patch()
    forward = unsloth["unsloth.models.gemma2"].forward
    lengths = torch.tensor([19, 1, 30], dtype=torch.int32)
    offsets = torch.tensor([0, 19, 20, 50], dtype=torch.int32)
    info = (lengths, offsets, 30)
    documents = torch.repeat_interleave(torch.arange(3), lengths)[None]
    q, k, v = make_qkv(Sizes(1, 4, 2, 50, 50))
    static = torch.zeros(96, 96).masked_fill(torch.ones(96, 96).triu(1).bool(), -torch.inf)
    for window, mask in (
        (None, softcap_runtime.create_flex_attention_causal_mask(96)),
        (16, softcap_runtime.create_flex_attention_sliding_window_mask(96, 16)),
        (None, static),  # of a model that made its masks before
    ):
        out = forward(q, k, v, mask, LAYER, generating, packed=info)
        assert relative_error(out, wanted(q, k, v, window, document_ids=documents)) <= 2e-6
        # What a call was told is not kept for the next.
        out = forward(q, k, v, mask, LAYER, generating)
        assert relative_error(out, wanted(q, k, v, window)) <= 2e-6
    with pytest.raises(ValueError, match="packed_seq_lengths: 3 packed sequences, with 1 batch rows and 1 qu"):
        forward(q[:, :, -1:], k, v, None, LAYER, generating, packed=info)
    checkered = (torch.arange(50)[:, None] + torch.arange(50)) % 2 == 0
    with pytest.raises(ValueError, match="no row interval"):
        forward(q, k, v, checkered, LAYER, generating, packed=info)


class Attention(torch.nn.Module):
    """A layer as unsloth 2026.10.9 compiles it: all of it in one region, its masks passed in."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LAYER.config

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        return sys.modules["unsloth.models.gemma2"].forward(q, k, v, mask, self)


def test_a_compiled_layer(unsloth: dict[str, ModuleType], fresh_dynamo: None, seed: int) -> None:
    """One graph for every length, without a break, though the layer asks for packed sequences on the way."""
    patch()
    layer, graphs = Attention(), []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    mask = unsloth["unsloth.models.gemma2"].create_flex_attention_sliding_window_mask(96, 16)
    for length in (40, 57, 33):
        q, k, v = (x.requires_grad_() for x in make_qkv(Sizes(2, 4, 2, length, length)))
        for x in (q, k, v):
            torch._dynamo.maybe_mark_dynamic(x, 2)
        out = compiled(q, k, v, mask)
        assert relative_error(out, wanted(q, k, v, 16)) <= 2e-6
        upstream = torch.randn_like(out)
        found = torch.autograd.grad(out, (q, k, v), upstream)
        for ours, plain in zip(found, torch.autograd.grad(layer(q, k, v, mask), (q, k, v), upstream), strict=True):
            assert relative_error(ours, plain) <= 2e-6
    assert len(graphs) == 1


def wanted(q: Tensor, k: Tensor, v: Tensor, window: int | None, **masks: Any) -> Tensor:
    config = AttentionConfig(softcap=30.0, scale=HEAD_DIM**-0.5, window=window)
    return expected(q, k, v, config, **masks).transpose(1, 2).reshape(q.shape[0], q.shape[2], -1)


def change(q: Any, k: Any, scale: Any) -> None:
    """A signature that unsloth doesn't have."""


@pytest.mark.parametrize(
    ("place", "name", "value", "words"),
    [
        ("unsloth.kernels.flex_attention", FUNCTIONS[0], change, "slow_attention_softcapping.*'scale'"),
        ("unsloth.kernels.flex_attention", CREATE[0], change, "create_flex_attention_causal_mask.*'scale'"),
        ("unsloth.kernels.flex_attention", FUNCTIONS[1], None, "slow_inference_attention_softcapping"),
        ("unsloth.kernels.flex_attention", CREATE[1], "gone", "has no create_flex_attention_sliding_window"),
        ("unsloth.models.gemma2", "slow_attention_softcapping", "gone", "gemma2 has no slow_attention"),
        ("unsloth.models.gemma2", "get_packed_info_from_kwargs", "gone", "has no get_packed_info"),
        ("unsloth.models.gemma2", "get_packed_info_from_kwargs", change, "get_packed_info_from_kwargs.*'scale'"),
        ("unsloth.trainer", "PADDING_FREE_BLOCKLIST", "gone", "has no PADDING_FREE_BLOCKLIST"),
        ("unsloth.trainer", "PADDING_FREE_BLOCKLIST", (), "is no set"),
    ],
)
def test_an_unknown_release(unsloth: dict[str, ModuleType], place: str, name: str, value: Any, words: str) -> None:
    if value == "gone":
        delattr(unsloth[place], name)
    else:
        setattr(unsloth[place], name, value)
    before = bound(unsloth)
    with pytest.raises(RuntimeError, match=f"unsloth 2026.10.9: .*{words}"):
        patch()
    assert bound(unsloth) == before


def test_no_unsloth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    with pytest.raises(ImportError, match=r"unsloth >= 2026\.10\.9 is needed"):
        patch()
