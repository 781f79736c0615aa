"""A small Gemma-2 with random weights, and the integration registered on the session's kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import pytest
import torch

from softcap_runtime import Runtime

transformers = pytest.importorskip("transformers", minversion="4.56")

from transformers import masking_utils  # noqa: E402

from softcap_runtime.integrations.transformers import register  # noqa: E402

NAME = "softcap"
WINDOW = 24
VOCABULARY = 97
# Older versions do not say whether a mask function is all their own, so that their masks are made outside a graph, and
# their functions that make masks take other arguments.
NEEDS_TRANSFORMERS_5 = pytest.mark.skipif(
    "use_vmap" not in signature(masking_utils.sdpa_mask).parameters, reason="a transformers before 5"
)


@pytest.fixture(scope="session")
def runtime(runtime: Runtime) -> Runtime:
    """The session's runtime, registered as ``attn_implementation="softcap"``."""
    register(runtime, NAME)
    return runtime


@contextmanager
def registered(runtime: Runtime | None, back_to: Runtime) -> Iterator[None]:
    register(runtime, NAME)
    try:
        yield
    finally:
        register(back_to, NAME)


def gemma(seed: int, **changes: Any) -> Any:
    """A Gemma2ForCausalLM of four layers, sliding and full, whose outputs depend on everything it sees."""
    torch.manual_seed(seed)
    fields: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 50.0,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
        # Tied embeddings and weights of the usual size make a random model repeat its last token.
        "tie_word_embeddings": False,
        "initializer_range": 0.2,
        "attn_implementation": "eager",
    }
    config = transformers.Gemma2Config(**{**fields, **changes})
    return transformers.Gemma2ForCausalLM(config).eval()


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length))


def both(model: Any, run: Callable[[], Any]) -> tuple[Any, Any]:
    """What ``run`` gives with eager attention, and with ours."""
    model.set_attn_implementation("eager")
    eager = run()
    model.set_attn_implementation(NAME)
    return eager, run()


def padded_run(model: Any) -> None:
    """Prefill, decoding with both kinds of cache and a training step, over a padded batch."""
    ids, mask = tokens(2, 20), torch.ones(2, 20, dtype=torch.int64)
    mask[1, :8] = 0
    for cache in (None, "static"):
        model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, cache_implementation=cache)
    model.train()(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
