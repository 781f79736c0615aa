"""Continuous batching: ``generate_batch`` gives the greedy tokens of ``generate``, one prompt at a time."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from support.helpers import HEAD_DIM
from torch import Tensor

from softcap_runtime import Runtime

from .conftest import NAME, VOCABULARY, transformers

ContinuousBatchingConfig = getattr(transformers, "ContinuousBatchingConfig", None)
if ContinuousBatchingConfig is None:
    pytest.skip("a transformers without ContinuousBatchingConfig", allow_module_level=True)

from softcap_runtime.integrations import hf_serving  # noqa: E402
from softcap_runtime.integrations.hf_serving import admit, packed_batch  # noqa: E402
from softcap_runtime.masks.intervals import dense  # noqa: E402

SERVING = f"{NAME}_flash"
# transformers 5.17 calls a page a block.
PAGE_SIZE = next(
    name for name in ("page_size", "block_size") if name in inspect.signature(ContinuousBatchingConfig).parameters
)
WINDOW = 16
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,  # so that every token depends on all that it sees
}
GEMMA = {"query_pre_attn_scalar": 64, "sliding_window": WINDOW}
MODELS = {
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=5.0)
    ),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(
        transformers.Gemma3TextConfig(**SIZES, **GEMMA, layer_types=["sliding_attention"] * 3 + ["full_attention"])
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
}
GREEDY = transformers.GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=-1, pad_token_id=0)


def prompts() -> list[list[int]]:
    """Shorter and longer than window, page and batch; the last begins as the second does."""
    lengths = (5, 40, 17, 1, 33, 64, 8, 20, 3, 50)
    made = [torch.randint(3, VOCABULARY, (length,)).tolist() for length in lengths]
    return [*made, made[1][:32] + made[2]]


def one_by_one(model: Any, requests: list[list[int]]) -> list[list[int]]:
    return [
        model.generate(torch.tensor([request]), generation_config=GREEDY)[0, len(request) :].tolist()
        for request in requests
    ]


def batched(model: Any, requests: list[list[int]], **config: Any) -> list[list[int]]:
    out = model.generate_batch(
        requests,
        generation_config=GREEDY,
        continuous_batching_config=ContinuousBatchingConfig(**{PAGE_SIZE: 16}, **config),
        progress_bar=False,
    )
    names = sorted(out, key=lambda name: int(name.rpartition("_")[2]))
    return [out[name].generated_tokens for name in names]


@pytest.mark.parametrize("kind", MODELS)
def test_the_tokens_of_generate(runtime: Runtime, kind: str, seed: int) -> None:
    model = MODELS[kind]().eval()
    requests = prompts()
    model.set_attn_implementation("eager")
    want = one_by_one(model, requests)
    assert len({tuple(tokens) for tokens in want}) > 5  # they tell the requests apart
    model.set_attn_implementation(SERVING)
    assert one_by_one(model, requests) == want
    # All at once; few requests at a time, prompts in chunks, and no room for all of them.
    for config in (
        {"num_blocks": 200, "max_batch_tokens": 512},
        {"num_blocks": 24, "max_batch_tokens": 48, "max_requests_per_batch": 6},
        {"num_blocks": 24, "max_batch_tokens": 48, "max_requests_per_batch": 6, "allow_block_sharing": False},
    ):
        assert batched(model, requests, **config) == want
    assert model.config._attn_implementation == SERVING


def test_half_precision(runtime: Runtime, seed: int) -> None:
    model = MODELS["gemma2"]().eval().to(torch.bfloat16)
    model.set_attn_implementation(SERVING)
    requests = prompts()[:4]
    assert [len(tokens) for tokens in batched(model, requests, num_blocks=64)] == [12] * 4


@pytest.mark.parametrize("readable", [True, False])  # False: as on a GPU
@pytest.mark.parametrize("window", [None, 1, 7])
def test_what_the_rows_of_a_batch_see(window: int | None, readable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a loop over requests: (new tokens, keys) of each, then rows of padding."""
    monkeypatch.setattr(hf_serving, "data_is_readable", lambda _: readable)
    for requests, padding in (
        ([(1, 9), (1, 1), (1, 30)], 0),
        ([(4, 9), (1, 5), (12, 12), (1, 1), (2, 30)], 0),
        ([(4, 9), (1, 5), (3, 3)], 5),
        ([(8, 20)], 0),
        ([(1, 3)], 2),
    ):
        rows, keys = (sum(sizes) for sizes in zip(*requests, strict=True))
        want = torch.zeros(rows + padding, keys + padding, dtype=torch.bool)
        row = key = 0
        for new, length in requests:
            for i in range(new):
                own = length - new + i
                for j in range(length):
                    want[row + i, key + j] = j <= own and (window is None or own - j < window)
            row, key = row + new, key + length
        offsets = [
            torch.tensor([0, *sizes, *[0] * padding]).cumsum(0, dtype=torch.int32)
            for sizes in zip(*requests, strict=True)
        ]
        longest = max(new for new, _ in requests)
        runs = packed_batch(rows + padding, keys + padding, *offsets, longest, window)
        assert [run.first for run in runs] == [0, *(run.past for run in runs[:-1])]
        got: Tensor = torch.cat([dense(mask, "cpu").reshape(-1, keys + padding) for _, _, mask in runs])
        assert torch.equal(got, want)


def test_tables_of_the_decode_fast_path_are_refused(runtime: Runtime) -> None:
    function = transformers.AttentionInterface()[SERVING]
    x = torch.zeros(1, 2, 3, HEAD_DIM)
    with pytest.raises(ValueError, match=r"block_table: .* set max_blocks_per_request=0"):
        function(torch.nn.Module(), x, x, x, None, cache=object(), block_table=torch.zeros(1, 2))


def test_a_name_is_admitted_once() -> None:
    from transformers import modeling_flash_attention_utils as utils

    admit(SERVING)
    hook = utils._lazy_imports
    admit(SERVING)
    assert utils._lazy_imports is hook
    with pytest.raises((ImportError, ValueError)):  # others go where they went
        utils._lazy_imports("another_flash")
