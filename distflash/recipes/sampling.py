"""Sampling of the next token, and decoding of bytes to text."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.recipes.together import is_lead


@dataclass(frozen=True)
class Sampler:
    """Nucleus sampling with temperature (https://arxiv.org/abs/1904.09751). Rank 0 samples and broadcasts.

    temperature: 0 for the likeliest token. top_p: total probability of the tokens to draw from.
    """

    temperature: float
    top_p: float
    generator: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token from `logits` [V], int64 [1, 1], the same on all ranks. All ranks call."""
        token = torch.full((1, 1), self.draw(logits) if is_lead() else 0, device=logits.device)
        if dist.get_world_size() > 1:
            dist.broadcast(token, src=0)
        return token

    def draw(self, logits: Tensor) -> int:
        # On the CPU in float64, so that a seed gives the same token on any device and number of ranks.
        logits = logits.double().cpu()
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = (logits / self.temperature).softmax(0)
        likeliest, tokens = probabilities.sort(descending=True, stable=True)
        before = likeliest.cumsum(0) - likeliest
        nucleus = likeliest * (before < self.top_p)  # the likeliest is always in it
        return int(tokens[torch.multinomial(nucleus, 1, generator=self.generator)])


@dataclass
class ByteText:
    """Decodes UTF-8 byte by byte. Invalid bytes become replacement characters.

    stop: the stop string, in bytes; empty for none.
    """

    stop: bytes = b""
    _end: bytes = b""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def add(self, byte: int) -> str:
        """The character that this byte completes; empty in the middle of one."""
        piece = bytes([byte])
        if self.stop:
            self._end = (self._end + piece)[-len(self.stop) :]
        return self._decoder.decode(piece)

    @property
    def stopped(self) -> bool:
        """Whether the text ends with `stop`."""
        return bool(self.stop) and self._end == self.stop

    def rest(self) -> str:
        """The end of the text: a replacement character if the last one is incomplete."""
        return self._decoder.decode(b"", final=True)
