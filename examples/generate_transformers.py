"""Generate with a model of Transformers whose keys and values are spread over the ranks.

    torchrun --nproc-per-node 2 examples/generate_transformers.py

A tiny random model, on CPUs where there are no GPUs. For a real one, take ``AutoModelForCausalLM.from_pretrained`` and
its tokenizer, and a prompt that fills more than one GPU.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.generation.streamers import BaseStreamer

import distflash as df
from distflash.integrations import transformers as dft

CONFIG = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
)


class Bytes(BaseStreamer):
    """Writes tokens, which are bytes here, as they come: the prompt, and then what the model makes of it."""

    def put(self, value: torch.Tensor) -> None:
        """Of some tokens."""
        print("".join(chr(n) if 32 <= n < 127 else "." for n in value.flatten().tolist()), end="", flush=True)

    def end(self) -> None:
        """Of a turn."""
        print()


def main() -> None:
    """Two turns of a conversation."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
    cp = df.ContextParallel(dist.group.WORLD)
    dft.register(cp)

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG, attn_implementation="distflash").to(device).eval()
    cache = dft.ShardedCache(cp)
    ids = torch.empty(1, 0, dtype=torch.int64, device=device)
    for turn in ("Once upon a time, " * 4, " And then? "):
        said = torch.tensor([list(turn.encode())], device=device)
        ids = torch.cat([ids, said], 1)  # every rank has the whole of it, which begins with what the cache has had
        cache.prefill(model, ids, chunk=32)
        streamer = Bytes() if cp.rank == 0 else None
        ids = model.generate(ids, past_key_values=cache, streamer=streamer, max_new_tokens=32, do_sample=True)
    if cp.rank == 0:
        print(f"{cache.lengths[0]} tokens, {cache.nbytes / 2**10:.0f} KiB of keys and values on each rank")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
