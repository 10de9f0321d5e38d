"""Tiny runs of TRL's SFTTrainer: unchanged on one process, and over ranks with distflash."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.trainer_runs import (
    CHECKPOINTING,
    VOCABULARY,
    Outcome,
    Run,
    arguments,
    finish,
    make_model,
    nudging,
    process_of_ranks,
    registered,
)

PACKED = (("packing", True), ("max_length", 29))
WRAPPED = (*PACKED, ("packing_strategy", "wrapped"))
PADDING_FREE = (("padding_free", True), ("max_length", None))
PADDED = (("max_length", None),)
ASSISTANT_ONLY = (*PADDED, ("assistant_only_loss", True))

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ' ' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + ' end ' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + ' end ' }}{% endif %}{% endfor %}"
)


def tokenizer() -> Any:
    """One token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["pad", "unknown", "end", "user", "assistant", *(f"w{n}" for n in range(VOCABULARY - 5))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="unknown"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokens = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="pad", eos_token="end", unk_token="unknown")
    tokens.chat_template = TEMPLATE
    return tokens


def dialogues(run: Run, count: int) -> Any:
    """Texts of very different lengths; of assistants, if only theirs count."""
    from datasets import Dataset

    generator = torch.Generator().manual_seed(7)

    def words(n: int) -> str:
        return " ".join(f"w{int(x)}" for x in torch.randint(VOCABULARY - 5, (n,), generator=generator))

    def messages(n: int) -> list[dict[str, str]]:
        return [{"role": "user", "content": words(2 + n % 7)}, {"role": "assistant", "content": words(1 + 2 * (n % 5))}]

    if dict(run.options).get("assistant_only_loss"):
        return Dataset.from_list([{"messages": messages(n)} for n in range(count)])
    return Dataset.from_list([{"text": words(3 + 4 * (n % 5))} for n in range(count)])


def fine_tune(run: Run, folder: Path, nudged: bool = False) -> Outcome:
    """On one process, by TRL alone."""
    import trl

    with process_of_ranks():
        return finish(make_sft(trl.SFTTrainer, run, "eager", folder, nudged))


def fine_tune_on_rank(run: Run, folder: Path) -> Outcome:
    """Runs as a rank."""
    from distflash.integrations import transformers as dft

    with process_of_ranks(), registered(run) as cp:
        return finish(make_sft(dft.SFTTrainer, run, "distflash", folder, context_parallel=cp))


def make_sft(kind: Any, run: Run, attention: str, folder: Path, nudged: bool = False, **others: Any) -> Any:
    from trl import SFTConfig

    # TRL's default, by the name that this version of Transformers has for it.
    given = arguments(run, folder, bf16=False, **{CHECKPOINTING: True})
    trainer = kind(
        make_model(run, attention),
        SFTConfig(**given),
        train_dataset=dialogues(run, 40),
        eval_dataset=dialogues(run, 7 if run.batch == 2 else 8),
        processing_class=tokenizer(),
        **others,
    )
    if nudged:
        trainer.add_callback(nudging())
    return trainer
