"""What the tests of kernels share: inputs as models lay them out, masks element by element, errors."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_map_only

from softcap_runtime import AttentionConfig, Runtime, reference
from softcap_runtime.artifacts.artifact import Artifact
from softcap_runtime.compat import torch_features

LAYOUTS = ("transposed", "contiguous", "fused", "expanded", "strided")
# flex has a kernel per head_dim: all tests share this one, and without a softcap that of 32, whose strides meet others
# (32 * 4 and 64 * 2): no kernel may take one for another.
HEAD_DIM, UNCAPPED_HEAD_DIM = 64, 32

# Largest relative errors (Frobenius) against float64 that are allowed. All inputs are rounded to the dtype
# before the float64 reference reads them, so this is the error of the computation alone.
FORWARD_TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
GRADIENT_TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 5e-3}


class Sizes(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int = HEAD_DIM


def make_qkv(
    sizes: Sizes, dtype: torch.dtype = torch.float32, layout: str = "transposed", factor: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v with the strides that models produce."""
    batch, heads, kv_heads, q_len, kv_len, dim = sizes

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape) * factor).to(dtype)

    if layout == "contiguous":
        return tuple(random(batch, h, s, dim) for h, s in ((heads, q_len), *[(kv_heads, kv_len)] * 2))
    if layout == "fused":  # slices of one projection [B, S, (Hq + 2 Hkv) * D]; q its last rows
        length = max(q_len, kv_len)
        fused = random(batch, length, (heads + 2 * kv_heads) * dim).view(batch, length, -1, dim)
        q, k, v = fused.split([heads, kv_heads, kv_heads], dim=2)
        return q[:, -q_len:].transpose(1, 2), k[:, :kv_len].transpose(1, 2), v[:, :kv_len].transpose(1, 2)
    if layout == "expanded":  # one key head and one batch row of keys, seen by all: strides of 0
        k, v = (random(1, kv_len, 1, dim).transpose(1, 2).expand(batch, kv_heads, -1, -1) for _ in "kv")
        return random(batch, q_len, heads, dim).transpose(1, 2), k, v
    if layout == "strided":  # last stride 2
        return tuple(random(batch, h, s, 2 * dim)[..., ::2] for h, s in ((heads, q_len), *[(kv_heads, kv_len)] * 2))
    assert layout == "transposed", layout
    return tuple(random(batch, s, h, dim).transpose(1, 2) for h, s in ((heads, q_len), *[(kv_heads, kv_len)] * 2))


def visible(q_len: int, kv_len: int, *, causal: bool, window: int | None, **masks: Tensor | None) -> Tensor:
    """The mask from the words of the specification, all S x S of it: bool ``[B or 1, Sq, Skv]``.

    It shares nothing with the row intervals it is compared to.
    """
    get = masks.get
    keys = torch.arange(kv_len)[None, None, :]
    cache = get("cache_lengths")
    past = torch.tensor([kv_len]) if cache is None else cache.long()
    positions = (torch.arange(q_len) + (past - q_len)[:, None])[..., None]
    if get("query_positions") is not None:
        positions = get("query_positions").long().view(-1, q_len, 1)
    seen = (keys < past[:, None, None]).expand(-1, q_len, -1)
    ahead = keys > positions
    if causal:
        joined = torch.zeros_like(ahead)
        ranges = [get("spans")] if get("spans") is not None else []
        if get("prefix_lengths") is not None:
            prefix = get("prefix_lengths").long()
            ranges.append(torch.stack([torch.zeros_like(prefix), prefix], -1)[:, None])
        for spans in ranges:
            for slot in spans.long().unbind(1):
                start, end = slot[:, 0, None, None], slot[:, 1, None, None]
                inside = (positions >= start) & (positions < end) & (keys >= start) & (keys < end)
                joined = joined | inside
        seen = seen & (~ahead | joined)
    if window is not None:
        seen = seen & ((positions - keys).abs() < window)
    if get("attention_mask") is not None:
        seen = seen & (get("attention_mask") != 0)[:, None, :]
    if get("document_ids") is not None:
        ids = get("document_ids")
        rows = max(ids.shape[0], positions.shape[0])
        ids, at = ids.expand(rows, -1), positions[..., 0].expand(rows, -1)
        own = ids.gather(1, at.clamp(0, kv_len - 1))
        seen = seen & (own[..., None] == ids[:, None, :]) & (at[..., None] >= 0)
    return seen


def expected(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, **masks: Tensor | None) -> Tensor:
    """The specification in float64: differentiable, ``[B, Hq, Sq, D]``."""
    mask = visible(q.shape[2], k.shape[2], causal=config.causal, window=config.window, **masks)
    return reference.attention(q.double(), k.double(), v.double(), mask, scale=config.scale, softcap=config.softcap)[0]


def hf_eager(q: Tensor, k: Tensor, v: Tensor, config: AttentionConfig, mask: Tensor) -> Tensor:
    """Attention as eager model code computes it: products in the input's dtype, the softmax alone in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    weights = (q @ k.mT) * config.scale
    if config.softcap is not None:
        weights = torch.tanh(weights / config.softcap) * config.softcap
    weights = weights.masked_fill(~mask[:, None], torch.finfo(q.dtype).min)
    return torch.softmax(weights, -1, dtype=torch.float32).to(q.dtype) @ v


def relative_error(got: Tensor, want: Tensor) -> float:
    """Relative Frobenius error; the plain norm where nothing is expected but zeros. NaN gives infinity."""
    got, want = got.detach().double(), want.detach().double()
    error, size = (got - want).norm(), want.norm()
    value = float(error / size) if size > 0 else float(error)
    return value if value == value else float("inf")


def in_model_order(x: Tensor) -> bool:
    """Whether ``[B, H, S, D]`` lies as ``[B, S, H, D]`` in memory, so the model's next reshape is a view."""
    return x.transpose(1, 2).is_contiguous()


def gradients(run: Any, inputs: tuple[Tensor, ...], grad_out: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``run(*inputs)`` and the gradients of all inputs; the inputs keep their strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves)
    return out.detach(), torch.autograd.grad(out, leaves, grad_out.to(out.dtype))


def dense_tolerance(config: AttentionConfig) -> float:
    """Of the dense engine in float32; a tanh that is off by float32's step at 1 moves logits by so much of the cap.

    Up to torch 2.6 a compiled tanh on the CPU is 2 / (1 + exp(-2x)) - 1; 2.7 was not looked at.
    """
    assert config.softcap is not None
    return 2e-6 if torch.__version__ >= "2.8" else 2e-6 + 1.2e-7 * config.softcap


# For tests whose figures are those of flex beside the blocked engine.
NEEDS_FLEX = pytest.mark.skipif(
    not torch_features.FLEX_PACKAGES, reason="this torch cannot compile flex_attention ahead of time"
)


class Block(torch.nn.Module):
    """A transformer's attention block; ``run`` computes the attention."""

    def __init__(self, run: Any, width: int = 128) -> None:
        super().__init__()
        self.run = run
        self.qkv = torch.nn.Linear(width, 4 * 64 + 2 * 2 * 64, bias=False)
        self.out = torch.nn.Linear(4 * 64, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, 64)).split([4, 2, 2], 2)
        out = self.run(*(y.transpose(1, 2) for y in (q, k, v)))
        return x + self.out(out.transpose(1, 2).reshape(*x.shape[:2], -1))

    def __deepcopy__(self, memo: Any) -> Block:
        other = Block(self.run)
        other.load_state_dict(self.state_dict())
        return other


class Case(NamedTuple):
    """One drawn call: ``masks`` are keyword arguments of ``Runtime.attention``, ``seed`` makes its inputs."""

    sizes: Sizes
    config: AttentionConfig
    masks: dict[str, Tensor]
    layout: str
    seed: int

    def inputs(self, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(self.seed)
        return make_qkv(self.sizes, dtype, self.layout, factor)

    def expected(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return expected(q, k, v, self.config, **self.masks)

    def visible(self) -> Tensor:
        lengths = self.sizes.q_len, self.sizes.kv_len
        return visible(*lengths, causal=self.config.causal, window=self.config.window, **self.masks)


@st.composite
def cases(draw: st.DrawFn, max_len: int = 300) -> Case:
    """Any call: every mask kind in any combination, short and long, every layout; simple ones first."""
    lengths = st.one_of(st.integers(1, min(12, max_len)), st.integers(1, max_len))
    kv_len = draw(lengths)
    causal = draw(st.sampled_from([True, True, False]))
    q_len = draw(st.one_of(st.just(kv_len), st.integers(1, kv_len) if causal else lengths))
    batch = draw(st.integers(1, 3))
    kv_heads = draw(st.sampled_from([1, 2]))
    heads = kv_heads * draw(st.sampled_from([1, 2, 4]))
    softcap = draw(
        st.one_of(st.none(), st.sampled_from([0.1, 1.0, 30.0, 50.0, 64.0, 64.5, 1000.0]), st.floats(0.1, 1000.0))
    )
    head_dim = UNCAPPED_HEAD_DIM if softcap is None else HEAD_DIM
    sizes = Sizes(batch, heads, kv_heads, q_len, kv_len, head_dim)
    config = AttentionConfig(
        softcap=softcap,
        scale=head_dim**-0.5 * draw(st.floats(0.5, 2.0)),
        window=draw(st.one_of(st.none(), st.integers(1, kv_len + 2))),
        causal=causal,
    )
    return Case(sizes, config, draw(masks(sizes)), draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**31 - 1)))


@st.composite
def masks(draw: st.DrawFn, sizes: Sizes) -> dict[str, Tensor]:
    """Any combination of the kinds that these lengths allow, each with one batch row or all."""
    q_len, kv_len = sizes.q_len, sizes.kv_len
    position = st.integers(0, kv_len)
    slots = draw(st.integers(1, 3))

    def padding() -> list[int]:
        first, last = sorted((draw(position), draw(position)))
        return [int(first <= j < last) for j in range(kv_len)]

    def documents() -> list[int]:
        cuts = draw(st.lists(position, max_size=6))
        return [3 * sum(cut <= j for cut in cuts) - 2 for j in range(kv_len)]

    def spans() -> list[list[int]]:
        cuts = sorted(draw(st.lists(position, min_size=2 * slots, max_size=2 * slots)))
        return draw(st.permutations([cuts[2 * n : 2 * n + 2] for n in range(slots)]))

    makers: dict[str, Any] = {
        "query_positions": lambda: [draw(st.integers(0, kv_len - 1)) for _ in range(q_len)],
        "attention_mask": padding,
        "prefix_lengths": lambda: draw(position),
        "spans": spans,
    }
    if q_len <= kv_len:  # these two give every query row a place among the keys
        makers["document_ids"] = documents
        makers["cache_lengths"] = lambda: draw(st.integers(q_len, kv_len))
    found = {}
    for name, make in makers.items():
        seldom = [0, 0] if name == "query_positions" else []
        rows = draw(st.sampled_from([0, 0, sizes.batch, 1, *seldom]))
        if rows:
            found[name] = torch.tensor([make() for _ in range(rows)])
    if len(found.get("query_positions", [])) == 1 and draw(st.booleans()):
        found["query_positions"] = found["query_positions"][0]
    if "attention_mask" in found and draw(st.booleans()):
        found["attention_mask"] = found["attention_mask"].bool()
    return found


def package_of(runtime: Runtime, spec: Artifact) -> bytes:
    """The bytes of a kernel, compiled if it is not in the runtime's cache."""
    runtime.supply.get(spec)
    key = spec.key()
    assert key is not None
    data = runtime.supply.store.load(key)
    assert data is not None
    return data


class Backend:
    """Runs what dynamo captured as it is, and counts the graphs."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward


class Wrapped(Tensor):
    """A tensor around another, as quantized, distributed and fake ones are: it has no memory of its own."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        strides, kind = inner.stride(), {"dtype": inner.dtype, "device": inner.device}
        return Tensor._make_wrapper_subclass(cls, inner.shape, strides=strides, **kind)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        args = tree_map_only(Wrapped, lambda x: x.inner, args)
        return tree_map_only(Tensor, Wrapped, function(*args, **(kwargs or {})))
