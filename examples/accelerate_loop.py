"""Train with a loop of accelerate, each sequence spread over the ranks of a group.

    torchrun --nproc-per-node 2 examples/accelerate_loop.py    # or accelerate launch

A tiny random model, on CPUs where there are no GPUs. For a real one, take
``AutoModelForCausalLM.from_pretrained(name, attn_implementation="distflash")``.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig

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
    """Train a few steps, two micro-batches each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seq-len", type=int, default=257)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()

    on_cpu = not torch.cuda.is_available()
    accelerator = Accelerator(cpu=on_cpu, gradient_accumulation_steps=2)
    started = dist.is_initialized()  # by the accelerator, under torchrun
    cp = df.ContextParallel(dist.group.WORLD if started else df.transport.Alone())
    dft.register(cp)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, options.steps)
    # The same batches on all ranks.
    loader = DataLoader(sequences(4 * options.steps, options.seq_len), batch_size=2)
    model, optimizer, loader, scheduler = dft.prepare(
        accelerator, model, optimizer, loader, scheduler, context_parallel=cp
    )
    model.train()
    for number, batch in enumerate(loader):
        with accelerator.accumulate(model):
            # Of this rank's tokens; the mean over ranks is the loss of the batch.
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        whole = cp.mean(loss.detach(), 1, reduction="mean")  # all ranks call
        if number % 8 == 7:
            accelerator.print(f"step {(number + 1) // 2}: loss {whole.item():.5f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
