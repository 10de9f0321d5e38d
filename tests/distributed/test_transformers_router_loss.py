"""Mixtures of experts over real ranks: loss with router loss, and gradients, equal those of one process."""

import pytest
import torch
import torch.distributed as dist

import distflash as df
from tests.tiny_models import CONFIGS_OF_EXPERTS, Case, relative, results

PRELOAD = "tests.tiny_models"


def model_and_kwargs(case, attention, by_config):
    model = case.model(attention)
    model.config.output_router_logits = by_config
    return model, {} if by_config else {"output_router_logits": True}


def on_rank(cases, layout, by_config, reduction):
    """Runs as a rank: its results, and the auxiliary loss."""
    from distflash.integrations import transformers as tf

    cp = df.ContextParallel(dist.group.WORLD, layout)
    tf.register(cp)
    found = []
    try:
        for case in cases:
            model, kwargs = model_and_kwargs(case, "distflash", by_config)
            if reduction is not None:
                model.loss_function = tf.loss_function(cp, reduction)
            out = model(**tf.shard_batch(case.inputs(), cp), **kwargs)
            out.loss.backward()
            found.append({**results(model, out.logits, out.loss), "aux_loss": out.aux_loss.detach()})
        return found
    finally:
        tf.unregister()


def on_one(case, by_config):
    model, kwargs = model_and_kwargs(case, "eager", by_config)
    out = model(**case.inputs(), use_cache=False, **kwargs)
    out.loss.backward()
    return {**results(model, out.logits, out.loss), "aux_loss": out.aux_loss.detach()}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world_size", "layout", "by_config", "reduction"),
    [(2, df.Zigzag(), False, None), (3, df.Contiguous(), True, "mean"), (3, df.Zigzag(), False, "sum")],
    ids=str,
)
def test_losses_and_gradients_are_one_processs(world_size, layout, by_config, reduction, ranks_of):
    cases = [Case(family) for family in CONFIGS_OF_EXPERTS]
    by_rank = ranks_of(world_size).run(on_rank, cases, layout, by_config, reduction)
    for case, parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        expected = on_one(case, by_config)
        assert abs(parts[0]["aux_loss"] - expected["aux_loss"]) <= 1e-6 * expected["aux_loss"]
        errors = {}
        for name in expected.keys() - {"logits", "aux_loss"}:
            total = torch.stack([part[name] for part in parts]).sum(0)
            is_sum = reduction == "sum" and name != "loss"
            errors[name] = relative(total if is_sum else total / world_size, expected[name])
        assert len(errors) > 10 and max(errors.values()) <= 1e-5, f"{case}: {errors}"
