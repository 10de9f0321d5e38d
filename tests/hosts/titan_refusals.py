"""Errors of the torchtitan integration, on a rank."""

from typing import Any

import torch

from tests.hosts import titan_runs

# isort: split
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.gpt_oss import model_registry as gpt_oss
from torchtitan.models.kimi_k2_7 import model_registry as kimi
from torchtitan.models.llama3 import model_registry as llama3

import distflash as df
from distflash.integrations.torchtitan import Batch, RingAttention, context_parallel
from distflash.integrations.torchtitan.batch import documents_of
from distflash.integrations.torchtitan.problems import config_problem
from distflash.transport import Alone
from tests.hosts.runs import TitanRun


def with_images() -> Any:
    spec = kimi("debugmodel")
    spec.model.vision_encoder = spec.model.norm  # any configuration
    return spec


MODELS = {
    "llama": lambda: llama3("debugmodel"),
    "windows by masks": lambda: gpt_oss("debugmodel", attn_backend="flex"),
    "windows by layer": lambda: gpt_oss("debugmodel", attn_backend="varlen"),
    "with images": with_images,
}


def of_configuration(options: tuple[tuple[str, Any], ...], model: str = "llama") -> str | None:
    config = context_parallel(titan_runs.configuration(TitanRun(context=2, options=options), "."))
    config.model_spec = MODELS[model]()
    return config_problem(config)


def of_another_layer() -> str | None:
    config = context_parallel(titan_runs.configuration(TitanRun(context=2), "."))
    config.model_spec.model.layers[1].attention.inner_attention = ScaledDotProductAttention.Config()
    return config_problem(config)


def of_another_trainer() -> str:
    return refused(lambda: context_parallel(context_parallel(titan_runs.configuration(TitanRun(), "."))))


def of_torchtitans_masks() -> str:
    return refused(lambda: RingAttention.Config().build()(*torch.zeros(3, 1, 4, 2, 8), attention_masks=None))


def of_score_mod() -> str:
    batch = Batch(df.ContextParallel(Alone()), None)
    attend = RingAttention.Config().build()
    return refused(lambda: attend(*torch.zeros(3, 1, 4, 2, 8), attention_masks=batch, score_mod=lambda *x: x[0]))


def documents(positions: list[list[int]]) -> Any:
    return documents_of(torch.tensor(positions))


def of_positions() -> str:
    return refused(lambda: documents([[0, 1, 2, 3], [0, 1, 5, 6]]))


def refused(make: Any) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    raise AssertionError("not refused")


def window_and_sinks() -> float:
    """The largest difference of a layer with a window and an epilogue from dense attention, in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 24, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    batch = Batch(df.ContextParallel(Alone()), documents([[*range(24)], [*range(10), *range(14)]]))
    layer = RingAttention.Config(window_size=(5, 0)).build()
    out = layer(q, k, v, attention_masks=batch, out_transform=lambda out, lse: out * torch.sigmoid(lse - 1)[..., None])
    i, j = torch.arange(24)[:, None], torch.arange(24)
    seen = ((j <= i) & (i - j <= 5)).repeat(2, 1, 1)
    seen[1] &= (i < 10) == (j < 10)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) * 8**-0.5
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    ones = torch.ones(2, 4, 24, 1, dtype=torch.float64)
    weights = torch.cat([scores, ones], -1).softmax(-1)[..., :-1]
    return float((out - torch.einsum("bhij,bjhd->bihd", weights, v.repeat_interleave(2, 2))).abs().max())
