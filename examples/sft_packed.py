"""Fine-tune with TRL's SFTTrainer on packed documents, sequences over all ranks.

    torchrun --nproc-per-node 2 examples/sft_packed.py

Each document sees itself only. A tiny random model and tokenizer, on CPUs where there
are no GPUs. For real ones, load both by ``from_pretrained``, the model with
``attn_implementation="distflash"``, and take a data set of texts or of messages.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from trl import SFTConfig

import distflash as df
from distflash.integrations import transformers as dft

WORDS = ["pad", "end", *(f"w{n}" for n in range(62))]
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, vocab_size=len(WORDS), num_attention_heads=4)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    numbers = {word: n for n, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="end"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "pad", "eos_token": "end"}
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def texts(count: int) -> Dataset:
    """Texts of 5 to 60 words that count up."""
    lengths = [5 + n * 11 % 56 for n in range(count)]
    words = [[f"w{(n * 7 + i) % 62}" for i in range(k)] for n, k in enumerate(lengths)]
    return Dataset.from_list([{"text": " ".join(text)} for text in words])


def main() -> None:
    """Train a few steps on sequences of 128 tokens, packed of whole texts."""
    on_cpu = not torch.cuda.is_available()
    args = SFTConfig(
        tempfile.mkdtemp(),
        use_cpu=on_cpu,
        bf16=not on_cpu,
        packing=True,
        max_length=128,
        per_device_train_batch_size=1,
        max_steps=30,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    cp = df.ContextParallel(
        init_device_mesh("cpu" if on_cpu else "cuda", (args.world_size,))
    )
    dft.register(cp)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash")
    data = {"train_dataset": texts(200), "processing_class": tokenizer()}
    dft.SFTTrainer(model, args, context_parallel=cp, **data).train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
