"""Which token comes next, and the text that bytes make."""

from __future__ import annotations

import codecs
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from distflash.recipes.together import is_lead


@dataclass(frozen=True)
class Sampler:
    """Draws tokens by temperature and nucleus (https://arxiv.org/abs/1904.09751). One rank draws, and all follow.

    temperature: 0 for the likeliest token. top_p: share of the probability that the tokens have that may be drawn.
    """

    temperature: float
    top_p: float
    generator: torch.Generator

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token, int64 [1, 1] on the device of `logits` [V], the first rank's on all ranks. All ranks call."""
        token = torch.full((1, 1), self.draw(logits) if is_lead() else 0, device=logits.device)
        if dist.get_world_size() > 1:
            dist.broadcast(token, src=0)
        return token

    def draw(self, logits: Tensor) -> int:
        # On the CPU and in float64: a seed gives the same token on any device and number of ranks, but for rounding.
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
    """Bytes as text, each character when all of its bytes are there. What is no UTF-8 becomes a replacement sign.

    stop: what ends the text, in bytes; empty for nothing.
    """

    stop: bytes = b""
    _end: bytes = b""
    _decoder: codecs.IncrementalDecoder = field(
        default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace")
    )

    def add(self, byte: int) -> str:
        """The characters that this byte completes: usually one, none in the middle of one."""
        piece = bytes([byte])
        if self.stop:
            self._end = (self._end + piece)[-len(self.stop) :]
        return self._decoder.decode(piece)

    @property
    def stopped(self) -> bool:
        """Whether the text ends with `stop`."""
        return bool(self.stop) and self._end == self.stop

    def rest(self) -> str:
        """What the end leaves of a character that was not completed."""
        return self._decoder.decode(b"", final=True)
