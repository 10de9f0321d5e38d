"""Replacements of torchtitan's parts for tests: GPU-only code, data, and attention on CPUs."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tests.hosts import titan_on_cpus  # noqa: F401  # before what takes names from torchtitan's utilities

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.override import derive, override
from torchtitan.models.common.attention import FlexAttention, VarlenAttention

VOCABULARY = 2048


class NoTokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return VOCABULARY


class Loader(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        packed: bool = True
        seed: int = 3
        infinite: bool = True

    def __init__(
        self, config: Config, *, dp_rank: int, dp_world_size: int, seq_len: int, local_batch_size: int, **_: Any
    ) -> None:
        self.mine = slice(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
        self.batches = batches(config.seed, local_batch_size * dp_world_size, seq_len, config.packed)

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for inputs, labels in self.batches:
            yield {name: x[self.mine] for name, x in inputs.items()}, labels[self.mine]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Dense(FlexAttention):
    """By the mask that torchtitan makes, every score written."""

    @dataclass(kw_only=True, slots=True)
    class Config(FlexAttention.Config):
        window_size: tuple[int, int] = (-1, 0)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.left, _ = config.window_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        attention_masks: Any,
        scale: Any = None,
        out_transform: Any = None,
        **_: Any,
    ) -> Tensor:
        batch, tokens, heads, dim = q.shape
        k, v = (x.repeat_interleave(heads // k.shape[2], dim=2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * (dim**-0.5 if scale is None else scale)
        scores = scores.masked_fill(~self.seen(attention_masks, batch, tokens), -torch.inf)
        out = torch.einsum("bhij,bjhd->bihd", F.softmax(scores, -1), v)
        return out if out_transform is None else out_transform(out, scores.logsumexp(-1).transpose(1, 2))

    def seen(self, masks: Any, batch: int, tokens: int) -> Tensor:
        rows, i, j = torch.arange(batch)[:, None, None], torch.arange(tokens)[:, None], torch.arange(tokens)
        if hasattr(masks, "mask_mod"):
            return masks.mask_mod(rows, torch.tensor(0), i, j)[:, None]
        document = torch.searchsorted(masks.cu_seq_q, torch.arange(batch * tokens), right=True).view(batch, tokens)
        seen = (document[:, :, None] == document[:, None, :]) & (j <= i)
        return (seen if self.left < 0 else seen & (i - j <= self.left))[:, None]


@override(target=FlexAttention.Config)
def dense(config: Any) -> Any:
    return derive(config, Dense.Config)


@override(target=VarlenAttention.Config)
def dense_varlen(config: Any) -> Any:
    return derive(config, Dense.Config)


def batches(seed: int, batch: int, seq_len: int, packed: bool) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
    """Sequences that are packed differently, about a third of whose labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, VOCABULARY, (batch, seq_len + 1), generator=generator)
        labels = tokens[:, 1:].clone()
        labels[torch.rand(batch, seq_len, generator=generator) < 0.3] = -100
        positions = torch.arange(seq_len).repeat(batch, 1)
        for row in positions if packed else []:
            cut = int(torch.randint(5, seq_len - 5, (1,), generator=generator))
            row[cut:] -= cut
        yield {"input": tokens[:, :-1], "positions": positions}, labels
