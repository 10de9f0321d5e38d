"""Train LoRA adapters with Transformers' Trainer and FSDP2, sequences over all ranks.

    torchrun --nproc-per-node 2 examples/lora_fsdp2.py

A tiny random model, whose weights stay frozen in bfloat16. FSDP2 shards them on GPUs;
accelerate has no FSDP on CPUs. For a real one, take ``from_pretrained``, with the same
``dtype`` and ``attn_implementation``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import distflash as df
from distflash.integrations import transformers as dft

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, vocab_size=256, num_attention_heads=4, pad_token_id=0)
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def sequences(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that count up, which is easy to learn. Every rank has the same."""
    starts = torch.randint(256, (count, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(seq_len)) % 256
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=int, default=257)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    # These start the process group.
    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        bf16=True,
        **({"fsdp": True, "fsdp_config": FSDP2} if on_gpu else {}),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_checkpointing=True,  # newer versions: activation_checkpointing
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    started = dist.is_initialized()
    cp = df.ContextParallel(dist.group.WORLD if started else df.transport.Alone())
    dft.register(cp)

    torch.manual_seed(0)
    options_of_model = {"attn_implementation": "distflash", "dtype": torch.bfloat16}
    model = AutoModelForCausalLM.from_config(CONFIG, **options_of_model)
    model.enable_input_require_grads()  # for checkpointing behind a frozen embedding
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    data = sequences(64, options.seq_len)
    dft.Trainer(model, args, context_parallel=cp, train_dataset=data).train()
    if started:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
