"""The generation job, in the order of execution: prompt, model, chunked prefill, decoding, end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

import distflash as df
from distflash.recipes.data import SEPARATOR
from distflash.recipes.inference_config import GenerateConfig
from distflash.recipes.sampling import ByteText, Sampler
from distflash.recipes.together import is_lead, together
from distflash.recipes.trained import Trained, load_trained
from distflash.recipes.trainer import on_ranks


def main(config: GenerateConfig) -> int:
    """Run the job and return its exit code."""
    return on_ranks(config, lambda device: generate(config, device))


def generate(config: GenerateConfig, device: torch.device) -> int:
    prompt = together(lambda: read_prompt(config) if is_lead() else b"")[0]
    trained = load_trained(config, device)
    tokens = torch.tensor([list(prompt)], device=device)
    caches = trained.caches(len(prompt) + config.max_new_tokens)
    sampler = Sampler(config.temperature, config.top_p, torch.Generator().manual_seed(config.seed))
    text, clock = ByteText(os.fsencode(config.stop or "")), Clock(device)
    with trained.inference():
        # The last prompt token is decoded, which gives every rank the logits of the first new token.
        prefill(trained, tokens[:, :-1], config.chunk, caches)
        clock.prefilled = clock.now()
        for token in decode(trained, tokens[:, -1:], caches, sampler, config.max_new_tokens):
            clock.decoded.append(clock.now())
            if token == SEPARATOR:
                break
            show(text.add(token))
            if text.stopped:
                break
    show(text.rest())
    if is_lead():
        print(f"\n{clock.report(len(prompt) - 1)}; {memory(caches)}", file=sys.stderr, flush=True)
    return 0


def read_prompt(config: GenerateConfig) -> bytes:
    """The prompt, on rank 0. An empty one is replaced by a separator, which starts a document."""
    if config.prompt is not None:
        prompt = os.fsencode(config.prompt)
    elif config.prompt_file is not None:
        prompt = config.prompt_file.read_bytes()
    else:
        if sys.stdin.isatty():
            print("The text to be continued, then Ctrl-D:", file=sys.stderr, flush=True)
        prompt = sys.stdin.buffer.read()
    return prompt or bytes([SEPARATOR])


def prefill(trained: Trained, tokens: Tensor, chunk: int, caches: list[df.Cache]) -> None:
    """Fill the caches with `tokens` [1, S], the same on every rank. All ranks call."""
    for part in tokens.split(chunk, dim=1) if tokens.shape[1] else ():
        trained.model.prefill(trained.cp.shard(part), part.shape[1], caches)


def decode(trained: Trained, token: Tensor, caches: list[df.Cache], sampler: Sampler, limit: int) -> Iterator[int]:
    """Generate tokens after `token` [1, 1], the same on all ranks. All ranks must consume equally many."""
    for _ in range(limit):
        token = sampler(trained.model.decode(token, caches)[0, -1])
        yield int(token)


def show(text: str) -> None:
    """Print on rank 0, and flush."""
    if text and is_lead():
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


@dataclass
class Clock:
    """Times in seconds: start, end of the prefill, and each new token."""

    device: torch.device
    prefilled: float = 0.0
    decoded: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def report(self, prefilled: int) -> str:
        """Rates in words. The first new token is not counted, since kernels are compiled for it."""
        seconds, steps = self.prefilled - self.start, len(self.decoded) - 1
        parts = [f"prefill: {prefilled:,} tokens in {seconds:.2f} s, {prefilled / seconds:,.0f} tokens/s"]
        if steps > 0:
            rate = steps / (self.decoded[-1] - self.decoded[0])
            parts.append(f"decoding: {steps + 1:,} tokens, {rate:,.1f} tokens/s")
        return "; ".join(parts)


def memory(caches: list[df.Cache]) -> str:
    capacity, total = caches[0].capacity, sum(cache.nbytes for cache in caches)
    return f"cache: {total / 2**20:,.2f} MiB on a rank for {capacity:,} tokens"
