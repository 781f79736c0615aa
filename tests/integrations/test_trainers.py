"""Losses of trainers that others wrote, step by step: "softcap" against eager attention, on the same weights and data.

The extra ``trainers`` installs them; what is missing is skipped.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from .conftest import NAME, gemma

pytest.importorskip("accelerate")

pytestmark = [pytest.mark.usefixtures("runtime"), pytest.mark.slow]

STEPS = 6
EOS = 2


def documents(count: int) -> list[dict[str, Any]]:
    """Texts of 5 to 60 tokens that count up, so that there is something to learn."""
    starts = [(random.randrange(3, 30), random.randrange(5, 60)) for _ in range(count)]
    return [{"input_ids": [*range(first, first + length), EOS]} for first, length in starts]


def padded(examples: list[dict[str, Any]]) -> dict[str, Tensor]:
    """One document a row."""
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seen = (ids != 0).long()
    return {"input_ids": ids, "attention_mask": seen, "labels": ids.masked_fill(seen == 0, -100)}


def options(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **more,
    }


def losses(trainer: Any) -> list[float]:
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == STEPS
    return found


def assert_same_curve(found: list[float], wanted: list[float]) -> None:
    """To 1e-3 of the loss, and it falls: a run that learns nothing would agree with anything."""
    print("softcap", found, "eager", wanted)
    assert wanted[-1] < 0.95 * wanted[0]
    for ours, theirs in zip(found, wanted, strict=True):
        assert abs(ours - theirs) <= 1e-3 * theirs


def run(seed: int, implementation: str, make: Callable[[Any], Any], **changes: Any) -> list[float]:
    model = gemma(seed, num_hidden_layers=2, initializer_range=0.05, eos_token_id=EOS, **changes)
    model.set_attn_implementation(implementation)
    return losses(make(model.train()))


def test_accumulated_gradients_of_flattened_batches_in_bf16(tmp_path: Path, seed: int) -> None:
    """Two documents in a row that hides them from each other, as two padded rows."""
    data = documents(STEPS * 4)
    how = options(tmp_path, bf16=True, gradient_accumulation_steps=2, per_device_train_batch_size=2)

    def make(collator: Callable[..., Any]) -> Callable[[Any], Any]:
        arguments = transformers.TrainingArguments(**how)
        return lambda model: transformers.Trainer(model, arguments, data_collator=collator, train_dataset=data)

    found = run(seed, NAME, make(transformers.DataCollatorWithFlattening()))
    assert_same_curve(found, run(seed, "eager", make(padded)))


class Apart:
    """A collator's packed rows with the mask that keeps their documents apart, for eager attention."""

    def __init__(self, collator: Callable[..., dict[str, Tensor]]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> dict[str, Tensor]:
        batch = self.collator(examples)
        ids = (batch["position_ids"] == 0).cumsum(-1)
        apart = (ids[:, None, :, None] == ids[:, None, None, :]).tril()
        hidden = torch.finfo(torch.float32).min
        return {**batch, "attention_mask": torch.zeros(apart.shape).masked_fill(~apart, hidden)}


def test_supervised_tuning_with_packing(tmp_path: Path, seed: int) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(documents(60))
    processing = word_level_tokenizer(tmp_path)
    how = options(tmp_path, packing=True, max_length=80, per_device_train_batch_size=2, bf16=False)

    def make(model: Any) -> Any:
        arguments = trl.SFTConfig(**how)
        trainer = trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=processing)
        if model.config._attn_implementation == "eager":
            trainer.data_collator = Apart(trainer.data_collator)
        return trainer

    # A mask of its own for all layers: none may have a window.
    found, wanted = (run(seed, name, make, sliding_window=4096) for name in (NAME, "eager"))
    assert_same_curve(found, wanted)


def word_level_tokenizer(folder: Path) -> Any:
    """Of numbers as words; only its padding and its end are used."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {str(number): number for number in range(97)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="1"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="0", eos_token=str(EOS))


def test_low_rank_adapters(tmp_path: Path, seed: int) -> None:
    peft = pytest.importorskip("peft")
    data = documents(STEPS * 4)
    arguments = transformers.TrainingArguments(**options(tmp_path, learning_rate=3e-2, per_device_train_batch_size=4))

    def make(model: Any) -> Any:
        adapted = peft.get_peft_model(
            model, peft.LoraConfig(r=8, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM")
        )
        return transformers.Trainer(adapted, arguments, data_collator=padded, train_dataset=data)

    found, wanted = (run(seed, name, make) for name in (NAME, "eager"))
    assert_same_curve(found, wanted)
