"""Train LoRA adapters with Transformers' Trainer and FSDP2, each sequence spread over the ranks of a group.

    torchrun --nproc-per-node 2 examples/lora_fsdp2.py

A tiny random model, whose weights stay frozen in bfloat16. FSDP2 shards them where there are GPUs; accelerate has no
FSDP on CPUs, where every rank holds all of them. For a real one, take
``AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16, attn_implementation="distflash")``.
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

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}


def sequences(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that count up, which is easy to learn. Every rank has the same."""
    starts = torch.randint(256, (count, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(seq_len)) % 256
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Train a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=257)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    on_gpu = torch.cuda.is_available()

    # The arguments start the process group, as torchrun has told them.
    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        bf16=True,
        **({"fsdp": True, "fsdp_config": FSDP2} if on_gpu else {}),
        max_steps=options.steps,
        per_device_train_batch_size=2,
        activation_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    cp = df.ContextParallel(dist.group.WORLD if dist.is_initialized() else df.transport.Alone())
    dft.register(cp)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash", dtype=torch.bfloat16)
    model.enable_input_require_grads()  # whose layers are checkpointed though the embedding is frozen
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    dft.Trainer(model, args, context_parallel=cp, train_dataset=sequences(64, options.seq_len)).train()
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
