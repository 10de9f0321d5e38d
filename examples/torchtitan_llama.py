"""Train torchtitan's debug Llama, each sequence spread over two ranks.

    torchrun --nproc-per-node 2 -m torchtitan.train --module examples.torchtitan_llama \
        --config counting_llama

torchtitan needs GPUs. A configuration of its registry keeps its own data and tokenizer:
`return context_parallel(llama3_8b())` is all of it then.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.config.configs import ParallelismConfig, TrainingConfig
from torchtitan.models.llama3.config_registry import llama3_debugmodel

from distflash.integrations.torchtitan import Trainer, context_parallel


class Counting(BaseDataLoader):
    """Batches of sequences that count up, other ones for each data rank."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Without options."""

    def __init__(self, config: Config, **sizes: Any) -> None:
        self.sizes = sizes

    def __iter__(self) -> Iterator[tuple[dict[str, torch.Tensor], torch.Tensor]]:
        batch, seq_len = self.sizes["local_batch_size"], self.sizes["seq_len"]
        generator = torch.Generator().manual_seed(self.sizes["dp_rank"])
        positions = torch.arange(seq_len).repeat(batch, 1)  # 0 where a document begins
        while True:
            start = torch.randint(2000, (batch, 1), generator=generator)
            text = (start + torch.arange(seq_len + 1)) % 2000
            yield {"input": text[:, :-1], "positions": positions}, text[:, 1:]

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class Bytes(BaseTokenizer):
    """A token for each byte of UTF-8."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        """Without options."""

    def __init__(self, config: Config, **_: Any) -> None:
        super().__init__()

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode()

    def get_vocab_size(self) -> int:
        return 2048


def counting_llama() -> Trainer.Config:
    """The debug model on this file's data, with attention over two ranks."""
    config = llama3_debugmodel()
    config.tokenizer, config.dataloader = Bytes.Config(), Counting.Config()
    sizes = {"local_batch_size": 2, "seq_len": 1024, "steps": 10}
    config.training = TrainingConfig(**sizes, disable_cuda_graphs=True)
    config.parallelism = ParallelismConfig(
        context_parallel_degree=2, spmd_backend="partial_dtensor"
    )
    config.validator.enable = False
    return context_parallel(config)
