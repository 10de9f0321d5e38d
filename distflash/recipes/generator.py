"""Generation in the order of its execution: prompt, model, prefill in chunks, decoding token by token, end."""

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
        # The last token waits: decoded on all ranks, it gives all of them the logits of the first new one.
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
    """On the first rank. Without any text, what comes before a document: a separator."""
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
    """Put `tokens` [1, S], which every rank has, into the caches. All ranks call."""
    for part in tokens.split(chunk, dim=1) if tokens.shape[1] else ():
        trained.model.prefill(trained.cp.shard(part), part.shape[1], caches)


def decode(trained: Trained, token: Tensor, caches: list[df.Cache], sampler: Sampler, limit: int) -> Iterator[int]:
    """New tokens, the same on all ranks, after `token` [1, 1]. All ranks take as many."""
    for _ in range(limit):
        token = sampler(trained.model.decode(token, caches)[0, -1])
        yield int(token)


def show(text: str) -> None:
    """On the first rank's terminal, at once."""
    if text and is_lead():
        sys.stdout.buffer.write(text.encode())
        sys.stdout.buffer.flush()


@dataclass
class Clock:
    """When the first rank began, in seconds, had the prompt in the caches, and had each new token."""

    device: torch.device
    prefilled: float = 0.0
    decoded: list[float] = field(default_factory=list)
    start: float = field(default_factory=time.perf_counter)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def report(self, prefilled: int) -> str:
        """After so many tokens of the prompt. The first new token is not counted: kernels are compiled for it."""
        seconds, steps = self.prefilled - self.start, len(self.decoded) - 1
        parts = [f"prefill: {prefilled:,} tokens in {seconds:.2f} s, {prefilled / seconds:,.0f} tokens/s"]
        if steps > 0:
            rate = steps / (self.decoded[-1] - self.decoded[0])
            parts.append(f"decoding: {steps + 1:,} tokens, {rate:,.1f} tokens/s")
        return "; ".join(parts)


def memory(caches: list[df.Cache]) -> str:
    capacity, total = caches[0].capacity, sum(cache.nbytes for cache in caches)
    return f"cache: {total / 2**20:,.2f} MiB on a rank for {capacity:,} tokens"
