"""Generate with a model of Transformers, with keys and values spread over the ranks.

    torchrun --nproc-per-node 2 examples/generate_transformers.py

A tiny random model, on CPUs where there are no GPUs. For a real one, take
``from_pretrained``, its tokenizer, and a prompt that fills more than one GPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.streamers import BaseStreamer

import distflash as df
from distflash.integrations import transformers as dft

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
CONFIG = LlamaConfig(**SIZES, vocab_size=256, num_attention_heads=4, pad_token_id=0)


class Bytes(BaseStreamer):
    """Writes tokens, which are bytes here, as they come."""

    def put(self, value: torch.Tensor) -> None:
        tokens = value.flatten().tolist()
        text = "".join(chr(n) if 32 <= n < 127 else "." for n in tokens)
        print(text, end="", flush=True)

    def end(self) -> None:
        print()


def main() -> None:
    """Two turns of a conversation."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mesh = dist.init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))
    cp = df.ContextParallel(mesh)
    dft.register(cp)

    torch.manual_seed(0)
    model = (
        AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash")
        .to(device)
        .eval()
    )
    cache = dft.ShardedCache(cp)
    ids = torch.empty(1, 0, dtype=torch.int64, device=device)
    for turn in ("Once upon a time, " * 4, " And then? "):
        said = torch.tensor([list(turn.encode())], device=device)
        ids = torch.cat([ids, said], 1)  # whole on every rank, from the first turn on
        cache.prefill(model, ids, chunk=32)
        streamer = Bytes() if cp.rank == 0 else None
        how = {"streamer": streamer, "max_new_tokens": 32, "do_sample": True}
        ids = model.generate(ids, past_key_values=cache, **how)
    if cp.rank == 0:
        kib = cache.nbytes / 2**10
        print(
            f"{cache.lengths[0]} tokens, {kib:.0f} KiB of keys and values on each rank"
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
