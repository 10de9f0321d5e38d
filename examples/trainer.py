"""Train with Transformers' Trainer, each sequence spread over the ranks of a group.

    torchrun --nproc-per-node 2 examples/trainer.py
    torchrun --nproc-per-node 4 examples/trainer.py --context 2    # data 2 x context 2

A tiny random model, on CPUs where there are no GPUs. For a real one, take
``AutoModelForCausalLM.from_pretrained(name, attn_implementation="distflash")``.
"""

from __future__ import annotations

import argparse
import tempfile

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, LlamaConfig, TrainingArguments

import distflash as df
from distflash.integrations import transformers as dft

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, vocab_size=256, num_attention_heads=4, pad_token_id=0)


def sequences(count: int, seq_len: int) -> list[dict[str, torch.Tensor]]:
    """Tokens that count up, which is easy to learn. Every rank has the same."""
    starts = torch.randint(256, (count, 1), generator=torch.Generator().manual_seed(0))
    tokens = (starts + torch.arange(seq_len)) % 256
    return [{"input_ids": row, "labels": row} for row in tokens]


def main() -> None:
    """Train a few steps and evaluate."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--context", type=int, help="ranks of a sequence; default: all")
    parser.add_argument("--seq-len", type=int, default=257)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    # These start the process group. Batch sizes are those of a data rank.
    args = TrainingArguments(
        tempfile.mkdtemp(),
        use_cpu=device == "cpu",
        max_steps=options.steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,  # newer versions: activation_checkpointing
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
    )
    context = options.context or args.world_size
    shape = (args.world_size // context, context)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("data", "context"))
    cp = df.ContextParallel(mesh["context"])
    dft.register(cp)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash")
    data = sequences(64, options.seq_len)
    sets = {"train_dataset": data, "eval_dataset": data[:8]}
    trainer = dft.Trainer(model, args, context_parallel=cp, **sets)
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]  # all ranks call
    if args.process_index == 0:
        print(f"evaluation: loss {loss:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
