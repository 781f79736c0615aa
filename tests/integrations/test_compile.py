"""``torch.compile`` of a Gemma-2 with ``attn_implementation="softcap"``, against eager attention uncompiled."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support.helpers import Backend
from transformers import masking_utils

from softcap_runtime import Runtime
from softcap_runtime.integrations.hf_mask_functions import Place, read
from softcap_runtime.integrations.hf_probe import probe
from softcap_runtime.integrations.transformers import HfMask, attention_forward
from softcap_runtime.masks.intervals import dense

from .conftest import NAME, NEEDS_TRANSFORMERS_5, WINDOW, gemma, registered, tokens
from .test_transformers import assert_close_gradients, gradients, padded

pytestmark = [pytest.mark.usefixtures("runtime", "fresh_dynamo"), NEEDS_TRANSFORMERS_5]


def eager_twin(model: Any, seed: int) -> Any:
    """The same weights with eager attention: a compiled model keeps its implementation."""
    twin = gemma(seed, num_hidden_layers=model.config.num_hidden_layers)
    twin.load_state_dict(model.state_dict())
    return twin


def inputs_of(kind: str, length: int) -> dict[str, Any]:
    """A batch of two rows, plain, padded on one side or in the middle, or packed; padding is not in the loss."""
    ids = tokens(2, length)
    inputs: dict[str, Any] = {"input_ids": ids, "labels": ids}
    if kind == "packed":
        first = length // 3
        inputs["position_ids"] = torch.cat([torch.arange(first), torch.arange(length - first)])[None]
    elif kind != "plain":
        inputs["attention_mask"] = padded("right" if kind == "holes" else kind, length, [length, length // 2])
        if kind == "holes":
            inputs["attention_mask"][:, 2 * length // 3 : 3 * length // 4] = 0
        inputs["labels"] = ids.masked_fill(inputs["attention_mask"] == 0, -100)
    return inputs


def of_any_length(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs whose length alone is a symbol of the graph. With ``dynamic=True`` every float of a model is one too, for
    which AOTAutograd lets dynamo and itself begin anew: three times as long, and the tests of one graph show that."""
    for x in {id(x): x for x in inputs.values()}.values():
        torch._dynamo.mark_dynamic(x, 1)
    return inputs


def assert_close_logits(theirs: Any, ours: Any, inputs: dict[str, Any]) -> None:
    seen = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    assert (theirs.logits - ours.logits)[seen].abs().max() < 1e-4


@pytest.mark.parametrize(("kind", "cached"), [("plain", True), ("left", False), ("holes", True)])
def test_one_graph_for_all_lengths(kind: str, cached: bool, seed: int) -> None:
    model = gemma(seed, num_hidden_layers=2, attn_implementation=NAME)
    twin, backend = eager_twin(model, seed), Backend()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for length in (40, 41, 90):
            inputs = inputs_of(kind, length)
            assert_close_logits(twin(**inputs), compiled(**inputs, use_cache=cached), inputs)
    assert len(backend.graphs) == 1


@pytest.mark.parametrize("kind", ["packed", "right", "holes"])
def test_gradients(kind: str, seed: int) -> None:
    model = gemma(seed, num_hidden_layers=2, attn_implementation=NAME).train()
    twin, backend = eager_twin(model, seed).train(), Backend()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for length in (40, 57):
        inputs = inputs_of(kind, length)
        (loss, wanted), (ours, found) = (gradients(one, **inputs) for one in (twin, compiled))
        assert abs(loss - ours) < 1e-5
        assert_close_gradients(wanted, {name.removeprefix("_orig_mod."): g for name, g in found.items()})
    assert len(backend.graphs) == 1


def test_gradients_with_checkpoints(seed: int) -> None:
    model = gemma(seed, num_hidden_layers=3, attn_implementation=NAME).train()
    twin = eager_twin(model, seed).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compiled = torch.compile(model, backend="aot_eager")
    for length in (40, 57):
        inputs = of_any_length(inputs_of("plain", length))
        (loss, wanted), (ours, found) = (gradients(one, **inputs) for one in (twin, compiled))
        assert abs(loss - ours) < 1e-5
        assert_close_gradients(wanted, {name.removeprefix("_orig_mod."): g for name, g in found.items()})


WRONG_IDS = """
import torch
from softcap_runtime import AttentionConfig, Runtime
torch.set_num_threads(2)
config = AttentionConfig(softcap=50.0, scale=0.125)
q, k, v = torch.randn(3, 2, 2, 300, 64)
compiled = torch.compile(lambda ids: Runtime.get().attention(q, k, v, config, document_ids=ids // 2), dynamic=True)
ids = torch.arange(300).expand(2, -1) // 7
compiled(ids)
try:
    compiled(ids.flip(1))
except RuntimeError as error:
    print("caught", error)
compiled(ids)
"""


@pytest.mark.slow
def test_an_error_inside_a_graph_can_be_caught(warm_cache: Path) -> None:
    """Not the end of the process, as of an exception inside of a loop that Inductor runs on several threads."""
    environment = {**os.environ, "SOFTCAP_CACHE_DIR": str(warm_cache), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", WRONG_IDS]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (run.returncode, run.stdout[:20]) == (0, "caught document_ids:"), run.stderr[-2000:]


@pytest.mark.slow
def test_holes_through_inductor(seed: int) -> None:
    """In one graph with masks that have none, which the next kernel doesn't have to know."""
    model = gemma(seed, num_hidden_layers=1, attn_implementation=NAME)
    twin = eager_twin(model, seed)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for kind in ("left", "holes", "left"):
            inputs = of_any_length(inputs_of(kind, 40))
            assert_close_logits(twin(**inputs), compiled(**inputs, use_cache=False), inputs)


@pytest.mark.slow
def test_a_training_step_through_inductor(seed: int) -> None:
    model = gemma(seed, num_hidden_layers=1, attn_implementation=NAME).train()
    inputs = inputs_of("packed", 40)
    loss, wanted = gradients(eager_twin(model, seed).train(), **inputs)
    ours, found = gradients(torch.compile(model, fullgraph=True), **inputs)
    assert abs(loss - ours) < 1e-5
    assert_close_gradients(wanted, {name.removeprefix("_orig_mod."): g for name, g in found.items()})


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool, seed: int) -> None:
    """One program for all lengths; while it is made, torch has functions of its own in the place of min and max."""

    class Logits(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(ids, attention_mask=mask, use_cache=False).logits

    model = gemma(seed, num_hidden_layers=2, attn_implementation=NAME)
    twin, length = eager_twin(model, seed), torch.export.Dim("length", min=4, max=400)
    examples = tokens(2, 40), padded("left", 40, [40, 20])
    with torch.no_grad():
        program = torch.export.export(
            Logits(model), examples, dynamic_shapes=({1: length}, {1: length}), strict=strict
        ).module()
        for count in (40, 57):
            ids, mask = tokens(2, count), padded("left", count, [count, 11])
            wanted = twin(ids, attention_mask=mask).logits
            assert (wanted - program(ids, mask))[mask.bool()].abs().max() < 1e-4
    plain = torch.export.export(model, examples[:1], {"use_cache": False}, strict=strict).module()
    assert (twin(examples[0]).logits - plain(examples[0], use_cache=False).logits).abs().max() < 1e-4


def test_generate_compiles_decoding_with_a_static_cache() -> None:
    """Transformers compiles the decoding step; it makes the masks outside and hands them in."""
    model = gemma(20, num_hidden_layers=2)
    ids, mask = tokens(2, 30), padded("left", 30, [30, 12])
    backend = Backend()

    def run(graph: torch.fx.GraphModule, example: Any) -> Any:  # generate copies objects, not functions
        return backend(graph, example)

    compilation = transformers.CompileConfig(fullgraph=True, dynamic=None, mode=None, backend=run)
    compilation._compile_all_devices = True  # by itself it does so on GPUs alone
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **options)
    model.set_attn_implementation(NAME)
    found = model.generate(ids, **options, cache_implementation="static", compile_config=compilation)
    assert torch.equal(wanted, found)
    assert 1 <= len(backend.graphs) <= 3


def test_a_mask_function_of_ones_own_is_read_outside_the_graph() -> None:
    config = transformers.Gemma2Config(attn_implementation=NAME, num_hidden_layers=1)

    def mask(x: torch.Tensor) -> HfMask:
        return masking_utils.create_causal_mask(
            config, x, None, past_key_values=None, and_mask_function=masking_utils.sliding_window_overlay(WINDOW)
        )

    x = torch.zeros(1, 50, 8)
    assert torch.compile(mask, backend="eager")(x) == mask(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"mask_function: may hold a part .* without fullgraph=True"):
        torch.compile(mask, backend="eager", fullgraph=True)(x)


PARTS = {
    "causal": lambda ids: masking_utils.causal_mask_function,
    "both ways": lambda ids: masking_utils.bidirectional_mask_function,
    "window": lambda ids: masking_utils.sliding_window_causal_mask_function(9),
    "window both ways": lambda ids: masking_utils.sliding_window_bidirectional_mask_function(9),
    "packed": lambda ids: masking_utils.and_masks(
        masking_utils.packed_sequence_mask_function(ids), masking_utils.sliding_window_causal_mask_function(9)
    ),
    "spans": lambda ids: masking_utils.or_masks(
        masking_utils.sliding_window_causal_mask_function(9),
        masking_utils.blockwise_overlay(torch.where(ids % 2 == 0, ids, -1)),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_probing_finds_what_reading_finds(part: str, seed: int) -> None:
    ids = (torch.rand(2, 150) < 0.03).cumsum(1)
    try:
        function = PARTS[part](ids)
    except AttributeError as error:
        pytest.skip(f"this transformers has no such part: {error}")
    places = [Place(150, 150, 150, 0, None, torch.device("cpu"))]
    if part not in ("packed", "spans"):
        places.append(Place(3, 80, 61, 70, None, torch.device("cpu")))  # a chunk, over a cache with free room
    for place in places:
        found, wanted = probe(function, 2, place), read(function, place)
        assert torch.equal(dense(found, "cpu").expand(2, -1, -1), dense(wanted, "cpu").expand(2, -1, -1))


def test_probing_reaches_as_far_as_a_mask_can() -> None:
    place = Place(2, 2**30, 2**30, 0, None, torch.device("cpu"))
    found = probe(masking_utils.causal_mask_function, 1, place)
    assert (found.lo.tolist(), found.hi.tolist()) == ([[0, 0]], [[2**30 - 1, 2**30]])


def test_a_first_use_inside_the_graph(
    runtime: Runtime, warm_cache: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """The process's own runtime is made while dynamo traces."""
    monkeypatch.setenv("SOFTCAP_CACHE_DIR", str(warm_cache))
    monkeypatch.setattr(Runtime, "_own", None)
    warnings.filterwarnings("error", message=".*lru_cache")  # until the end of the test
    model, ids, backend = gemma(seed, num_hidden_layers=1, attn_implementation=NAME), tokens(1, 12), Backend()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        wanted = model(ids).logits
        with registered(None, back_to=runtime):
            found = [compiled(ids).logits for _ in range(2)]
    assert all((one - wanted).abs().max() < 1e-4 for one in found)
    assert len(backend.graphs) == 1
    assert Runtime._own is not None


def test_a_layer_without_mask(runtime: Runtime, seed: int) -> None:
    layer, backend = gemma(seed, num_hidden_layers=1).model.layers[0].self_attn, Backend()

    def attend(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return attention_forward(runtime, layer, q, k, k, None, softcap=50.0, sliding_window=WINDOW)[0]

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=backend)
    for length in (30, 41):
        q, k = torch.randn(2, 4, length, 64), torch.randn(2, 2, length, 64)
        assert (compiled(q, k) - attend(q, k)).abs().max() < 1e-5
    assert len(backend.graphs) == 1
