"""A small Gemma-2 in unsloth's own hands, as it is and under ``patch()``: ``python unsloth_gemma2.py [RESULTS.json]``.

Both modes load the same folder, generate, train the same ten steps and pack; each part that fails prints its traceback
and leaves its key out. A program of its own, because ``import unsloth`` changes torch and transformers for the whole
process.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SCRATCH = tempfile.mkdtemp(prefix="unsloth_gemma2_")
os.environ.update(
    HF_HUB_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    UNSLOTH_DISABLE_STATISTICS="1",
    UNSLOTH_MEGA_CACHE="0",
    # Compiling whole layers, torch 2.11 fails in the backward of unsloth's own training.
    UNSLOTH_BLOCK_COMPILE="0",
    UNSLOTH_COMPILE_LOCATION=f"{SCRATCH}/unsloth_compiled_cache",
    TOKENIZERS_PARALLELISM="false",
    # What unsloth can't find it may offer to install.
    PIP_NO_INDEX="1",
)
RESULTS = [Path(name).resolve() for name in sys.argv[1:2]]
os.chdir(SCRATCH)
# Where it can't load bitsandbytes, unsloth looks for CUDA's libraries by running ldconfig.
_system, os.system = os.system, lambda command: print("not run:", command) or 0  # type: ignore[assignment]

import unsloth  # noqa: E402  (before what it patches)

os.system = _system

import torch  # noqa: E402
import transformers  # noqa: E402
import unsloth.kernels.flex_attention as home  # noqa: E402
import unsloth.models._utils as unsloth_utils  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from torch import Tensor  # noqa: E402
from unsloth import FastLanguageModel  # noqa: E402

import softcap_runtime.flex_attention as our_functions  # noqa: E402
import softcap_runtime.integrations.unsloth as integration  # noqa: E402
from softcap_runtime import Runtime  # noqa: E402

VOCABULARY, WINDOW, LENGTHS, LONGEST = 512, 256, (1024, 777), 2048
HEAD_DIM, LAYERS = 128, 2  # one layer with a window and one without
STEPS, BATCH, NEW_TOKENS = 10, 2, 32
SEED = 3407
STARTED = time.perf_counter()


def say(*words: Any) -> None:
    print(f"[{time.perf_counter() - STARTED:6.1f} s]", *words, flush=True)


def make_folder(folder: Path) -> Tensor:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, "<unk>": 3}
    words.update({str(number): number for number in range(4, VOCABULARY)})
    tokens = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(SEED)
    config = transformers.Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=4 * HEAD_DIM // 2,
        intermediate_size=4 * HEAD_DIM,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_DIM,
        query_pre_attn_scalar=HEAD_DIM,
        sliding_window=WINDOW,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        max_position_embeddings=LONGEST,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        # Tied embeddings and weights of the usual size make a random model repeat its last token.
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    model = transformers.Gemma2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    # Before unsloth has this model's classes in its hands: what float32 says of the same weights.
    model.set_attn_implementation("eager")
    model = model.float().eval().to("cuda")
    with torch.no_grad():
        return model(input_ids=prompt()).logits.float().cpu()


def load(folder: Path) -> tuple[Any, Any]:
    torch.manual_seed(SEED)
    return FastLanguageModel.from_pretrained(
        str(folder), max_seq_length=LONGEST, dtype=torch.bfloat16, load_in_4bit=False, random_state=SEED
    )


def adapt(model: Any) -> Any:
    torch.manual_seed(SEED)
    return FastLanguageModel.get_peft_model(
        model,
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        random_state=SEED,
        use_gradient_checkpointing="unsloth",
    )


def counting(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Rows that count up from random starts by random strides: something to learn, by looking back."""
    first = torch.randint(0, VOCABULARY, (batch, 1), generator=generator)
    stride = torch.randint(1, 7, (batch, 1), generator=generator)
    return (4 + (first + stride * torch.arange(length)) % (VOCABULARY - 4)).to("cuda")


def train(model: Any) -> list[float]:
    """Ten steps of AdamW on two batches, one of each length, by turns."""
    FastLanguageModel.for_training(model)
    learnt = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learnt, lr=5e-3, weight_decay=0.0)
    generator = torch.Generator().manual_seed(SEED)
    batches = [counting(BATCH, length, generator) for length in LENGTHS]
    losses = []
    for step in range(STEPS):
        ids = batches[step % len(batches)]
        loss = model(input_ids=ids, labels=ids.clone(), attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    return losses


def generate(model: Any, padded: bool) -> list[list[int]]:
    """Greedy tokens after a prompt that is longer than the window; ``padded``: two rows, one with padding before it."""
    FastLanguageModel.for_inference(model)
    generator = torch.Generator().manual_seed(SEED + 1)
    ids = counting(2 if padded else 1, WINDOW + WINDOW // 4, generator)
    mask = torch.ones_like(ids)
    if padded:
        ids[1, : WINDOW // 5] = 0
        mask[1, : WINDOW // 5] = 0
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
    )
    return [row[ids.shape[1] :].tolist() for row in out]


def prefill(model: Any) -> Tensor:
    """Logits of a prompt without a cache, as evaluation asks for them."""
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    with torch.no_grad():
        return model(input_ids=prompt()).logits.float().cpu()


def prompt() -> Tensor:
    return counting(1, LENGTHS[1], torch.Generator().manual_seed(SEED + 2))


def packed(model: Any) -> float:
    """The largest difference of logits: three documents in a row and each alone, relative to the largest logit."""
    FastLanguageModel.for_training(model, use_gradient_checkpointing=False)
    generator = torch.Generator().manual_seed(SEED + 3)
    documents = [counting(1, LENGTHS[1] // part, generator) for part in (1, 2, 3)]
    lengths = torch.tensor([document.shape[1] for document in documents], dtype=torch.int32)
    positions = torch.cat([torch.arange(int(length)) for length in lengths])[None].to("cuda")
    with torch.no_grad():
        alone = torch.cat([model(input_ids=document).logits for document in documents], 1).float()
        together = model(
            input_ids=torch.cat(documents, 1), position_ids=positions, packed_seq_lengths=lengths.to("cuda")
        ).logits.float()
    return float((together - alone).abs().max() / alone.abs().max())


def supervised(folder: Path, model: Any, tokenizer: Any) -> dict[str, Any]:
    """TRL's trainer as unsloth changes it, with packing; tells whether batches were packed."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    FastLanguageModel.for_training(model)
    generator = torch.Generator().manual_seed(SEED + 4)
    rows = []
    for index in range(24):
        length = LENGTHS[1] // (2 + index % 5)
        rows.append({"text": " ".join(map(str, counting(1, length, generator)[0].tolist()))})
    arguments = SFTConfig(
        output_dir=str(folder),
        dataset_text_field="text",
        packing=True,
        max_length=LENGTHS[0],
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=True,
        disable_tqdm=True,
        seed=SEED,
        dataset_num_proc=1,
    )
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=Dataset.from_list(rows), args=arguments)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = [f"{name}{list(value.shape)}" for name, value in batch.items() if isinstance(value, Tensor)]
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": losses, "batch": seen, "packing": trainer.args.packing}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often each attention was really called outside graphs: unsloth's own below its public name, and ours."""
    calls: Counter[str] = Counter()
    restore: list[Callable[[], None]] = []

    def count(module: Any, name: str, label: Callable[..., str]) -> None:
        function = getattr(module, name)

        def counter(*args: Any, **kwargs: Any) -> Any:
            if not torch.compiler.is_compiling():  # what is traced runs without this later
                calls[label(*args)] += 1
            return function(*args, **kwargs)

        setattr(module, name, counter)
        restore.append(lambda: setattr(module, name, function))

    def ours(q: Tensor, k: Tensor, v: Tensor, mask: Any, *rest: Any) -> str:
        engine, documents = (*rest[3:], None, None)[:2]
        rows = "decoding" if q.shape[2] == 1 else "rows"
        told = " packed" if documents is not None else ""
        return f"ours, engine {engine or 'chosen'}, {type(mask).__name__}, {rows}{told}"

    count(home, "_softcapping_attention", lambda *_: "unsloth's training attention")
    count(home, "torch_nn_functional_softmax", lambda *_: "unsloth's inference attention")
    for module in (our_functions, integration):
        count(module, "attend", ours)
    try:
        yield calls
    finally:
        for undo in restore:
            undo()


class Mode:
    """Parts run in one mode, what they found in ``found``; what failed in ``found["failed"]``."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.found: dict[str, Any] = {"failed": []}

    def part(self, name: str, action: Callable[[], Any]) -> Any:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch._dynamo.utils.counters.clear()
        started, before, ours = time.perf_counter(), torch.cuda.memory_allocated(), engine_calls()
        with counted() as calls:
            try:
                value = action()
                torch.cuda.synchronize()
            except Exception:
                say(f"{self.name}: {name} FAILED, calls {dict(calls)}")
                traceback.print_exc()
                sys.stderr.flush()
                self.found["failed"].append(name)
                return None
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        engines = {key: count - ours.get(key, 0) for key, count in engine_calls().items() if count != ours.get(key, 0)}
        graphs = torch._dynamo.utils.counters
        self.found[f"{name}: calls"] = dict(calls)
        self.found[f"{name}: engines"] = engines
        self.found[f"{name}: graphs"] = graphs["stats"].get("unique_graphs", 0)
        self.found[f"{name}: peak MiB above start"] = round(peak, 1)
        say(
            f"{self.name}: {name}: {time.perf_counter() - started:.1f} s, peak memory {peak:.1f} MiB over "
            f"{before / 2**20:.1f}, calls {dict(calls)}, engines {engines}, graphs "
            f"{graphs['stats'].get('unique_graphs', 0)}, breaks {[key[:160] for key in graphs['graph_break']]}"
        )
        return value

    def core(self, folder: Path) -> None:
        loaded = self.part("load", lambda: load(folder))
        if loaded is None:
            return
        model, self.tokenizer = loaded
        self.found["logits"] = self.part("prefill", lambda: prefill(model))
        self.found["generated"] = self.part("generate", lambda: generate(model, False))
        self.found["generated, padded"] = self.part("generate padded", lambda: generate(model, True))
        self.model = model = self.part("adapt", lambda: adapt(model)) or model
        self.found["losses"] = self.part("train", lambda: train(model))
        say(self.name, "losses", self.found["losses"])
        self.found["blocks"] = blocks(model)
        say(self.name, "blocks", self.found["blocks"])
        self.found["generated, trained"] = self.part("generate trained", lambda: generate(model, False))
        holder = next((module for module in model.modules() if hasattr(module, "SWA_mask")), None)
        masks = None if holder is None else [type(holder.SWA_mask).__name__, type(holder.GA_mask).__name__]
        self.found["masks"] = masks
        self.found["fell back to eager"] = dict(getattr(home, "_SOFTCAP_EAGER", {}))

    def packing(self, folder: Path) -> None:
        if hasattr(self, "model"):
            model, tokenizer = self.model, self.tokenizer
            self.found["packed"] = self.part("packed", lambda: packed(model))
            say(self.name, "packed", self.found["packed"])
            out = folder / f"out_{self.name}"
            self.found["supervised"] = self.part("supervised", lambda: supervised(out, model, tokenizer))
            say(self.name, "supervised", self.found["supervised"])


def engine_calls() -> dict[str, int]:
    return {f"{entry.engine}": entry.calls + entry.plans for entry in Runtime.get().stats().engines}


def blocks(model: Any) -> dict[str, Any]:
    """How unsloth's per-block compilation went: 1 the whole layer, 2 without flex_attention, 0 not compiled."""
    layers = [module for module in model.modules() if type(module).__name__ == "Gemma2DecoderLayer"]
    state = getattr(getattr(type(layers[0]), "forward", None), "_unsloth_block_state", None) if layers else None
    modes = [layer.__dict__.get("_unsloth_block_mode") for layer in layers]
    return {"modes": modes, "failures": [] if state is None else sorted(map(str, state["reported"]))}


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """The share of tokens that agree up to the first that doesn't, over all rows."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        same += next((index for index, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, theirs))


def main() -> None:
    say(
        f"unsloth {unsloth.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.cuda.get_device_name()}, HAS_FLASH_ATTENTION_SOFTCAPPING "
        f"{unsloth_utils.HAS_FLASH_ATTENTION_SOFTCAPPING}, HAS_FLEX_ATTENTION {home.HAS_FLEX_ATTENTION}"
    )
    folder = Path(SCRATCH) / "model"
    reference = make_folder(folder)
    unpatched, patched = Mode("unsloth"), Mode("patched")
    theirs, ours = unpatched.found, patched.found
    unpatched.core(folder)
    replaced = integration.patch()
    say(f"patch() replaced {len(replaced)} names, HAS_FLEX_ATTENTION {home.HAS_FLEX_ATTENTION}")
    patched.core(folder)
    patched.packing(folder)
    say(f"stats: {Runtime.get().stats()}")
    restored = integration.unpatch()
    results: dict[str, Any] = {"patch and unpatch agree": sorted(restored) == sorted(replaced)}
    again = None
    try:  # as if nothing had been
        model, _ = load(folder)
        again = prefill(model)
    except Exception:
        say("after unpatch() FAILED")
        traceback.print_exc()
    unpatched.packing(folder)
    if again is not None and theirs.get("logits") is not None:
        results["after unpatch, largest difference of logits"] = float((again - theirs["logits"]).abs().max())
    for name in ("failed", "losses", "generated", "generated, padded", "generated, trained", "packed", "supervised"):
        results[name] = {"unsloth": theirs.get(name), "patched": ours.get(name)}
    for name in ("masks", "blocks", "fell back to eager", *(key for key in ours if ": " in key)):
        results[name] = {"unsloth": theirs.get(name), "patched": ours.get(name)}
    if ours.get("losses") and theirs.get("losses"):
        results["largest relative difference of losses"] = largest_difference(ours["losses"], theirs["losses"])
    if ours.get("logits") is not None and theirs.get("logits") is not None:
        scale = theirs["logits"].abs().max()
        for mode, found in (("unsloth", theirs), ("patched", ours)):
            results[f"{mode}: relative error of logits"] = float((found["logits"] - reference).abs().max() / scale)
        results["relative difference of logits"] = float((ours["logits"] - theirs["logits"]).abs().max() / scale)
    for name in ("generated", "generated, padded", "generated, trained"):
        if ours.get(name) and theirs.get(name):
            results[f"{name}: agreement"] = agreement(ours[name], theirs[name])
    print(text := json.dumps(results, indent=1), flush=True)
    for path in RESULTS:
        path.write_text(text)


if __name__ == "__main__":
    main()
