"""Tiny models of the text families of the installed Transformers library, over ranks and beside eager attention on one.

[Note: shapes] B batch, T local tokens, S global tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.auto import configuration_auto, modeling_auto

import distflash as df
from distflash.integrations import transformers as dft
from tools.family_sizes import OVERRIDES, SIZES, WITHOUT_FLASH

BATCH, SEQ_LEN, IGNORED = 2, 23, -100
# Up to this error a family is equal: rounding in float32.
TOLERANCE = 1e-5
# A tiny configuration that is not tiny has a size under a name that `SIZES` does not know.
_MOST_PARAMETERS = 3 * 10**6

HEADS: dict[str, dict[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Family:
    """A model class of the library. head: what its logits are."""

    model_type: str
    class_name: str
    head: str

    def config(self) -> Any:
        cls = configuration_auto.CONFIG_MAPPING[self.model_type]
        known = inspect.signature(cls.__init__).parameters
        sizes = {name: size for name, size in SIZES.items() if name in known}
        return cls(**{**sizes, **OVERRIDES.get(self.class_name, OVERRIDES.get(self.model_type, {}))})

    def model(self, attention: str) -> Any:
        """With random weights far from 0, gains and biases included, so that no part of a model is idle."""
        cls = getattr(transformers, self.class_name)
        with torch.device("meta"):
            size = sum(p.numel() for p in cls(self.config()).parameters())
        assert size <= _MOST_PARAMETERS, f"{size} parameters; make the configuration tiny in OVERRIDES"
        torch.manual_seed(0)
        model = cls._from_config(self.config(), attn_implementation=attention).float().eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        return model

    def batch(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(3, SIZES["vocab_size"], (BATCH, SEQ_LEN), generator=generator)
        labels = ids.clone()
        labels[0, 3:9] = IGNORED
        return {"input_ids": ids, "labels": labels} if self.head == "causal" else {"input_ids": ids}


def families() -> Iterator[Family]:
    """All text families: those whose configuration holds no other one, of images, audio or a text model beside them."""
    for head, classes in HEADS.items():
        for model_type, names in sorted(classes.items()):
            if not configuration_auto.CONFIG_MAPPING[model_type].sub_configs:
                yield Family(model_type, names if isinstance(names, str) else names[0], head)


Results = dict[str, Tensor]


def eager(family: Family) -> Results:
    """On one process, with what a user would pass there: the whole batch, and no position ids."""
    model, batch = family.model("eager"), family.batch()
    logits = model(input_ids=batch["input_ids"]).logits
    loss = _loss_sum(family, logits, _targets(family, batch))
    if family.head == "causal":
        loss = loss / (batch["labels"][:, 1:] != IGNORED).sum()
    loss.backward()
    return _results(model, logits, loss)


def over_ranks(family: Family, cp: df.ContextParallel) -> Results:
    """Over the ranks that ``cp`` is registered for: logits of all tokens, and the mean of losses and gradients."""
    name = dft.OTHER_NAME if family.model_type in WITHOUT_FLASH else dft.NAME
    model, batch = family.model(name), family.batch()
    if family.model_type in dft.MIXERS:
        dft.gather_layers(model, cp)
    out = model(**dft.shard_batch(batch, cp))
    if family.head == "causal":
        loss = out.loss
    else:
        loss = cp.world_size * _loss_sum(family, out.logits, cp.shard(_targets(family, batch)))
    loss.backward()
    results = _results(model, out.logits, loss)
    logits = cp.unshard(results.pop("logits"))
    means = {name: cp.transport.all_reduce(x.contiguous()) / cp.world_size for name, x in results.items()}
    return {"logits": logits, **means}


def error(got: Results, expected: Results) -> float:
    """The largest relative error of logits, loss and the gradient of all parameters together."""
    squares = {name: (got[name] - x).square().sum() for name, x in expected.items()}
    norms = {name: x.square().sum() for name, x in expected.items()}
    gradient = expected.keys() - {"logits", "loss"}
    parts = [{"logits"}, {"loss"}, gradient]
    return max(float(sum(squares[n] for n in part) / sum(norms[n] for n in part)) ** 0.5 for part in parts)


def outcome(family: Family, cp: df.ContextParallel) -> str:
    """In words: "equal (error)", "refused: reason" or "wrong (error)". All ranks of ``cp`` call."""
    dft.register(cp)
    try:
        got = over_ranks(family, cp)
    except ValueError as refusal:
        return f"refused: {refusal}"
    finally:
        dft.unregister()
    relative = error(got, eager(family))
    return f"{'equal' if relative <= TOLERANCE else 'wrong'} ({relative:.0e})"


def _targets(family: Family, batch: dict[str, Tensor]) -> Tensor:
    """Each at the token that predicts it."""
    if family.head == "causal":
        return F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    return batch["input_ids"]


def _loss_sum(family: Family, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def _results(model: Any, logits: Tensor, loss: Tensor) -> Results:
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    return {"logits": logits.detach(), "loss": loss.detach(), **gradients}
