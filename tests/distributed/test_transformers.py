"""Transformers models over real ranks: logits, loss and gradients equal those of eager attention on one."""

import math
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import distflash as df
from distflash.recipes.reporting import read_metrics
from tests import forked
from tests.tiny_models import CONFIGS, CONFIGS_OF_MASKS, Case, eager, enable_checkpointing, relative, results

PRELOAD = "tests.tiny_models"
# No number of ranks divides these lengths, and documents end within the ranks' parts.
LENGTHS = [(37,), (1, 11, 25)]


def integration():
    """Loaded by the ranks only, and when they need it: it takes seconds."""
    from distflash.integrations import transformers

    return transformers


def on_rank(cases, layout):
    """Runs as a rank: its part of each case's results, with the model's own loss."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD, layout)
    tf.register(cp)
    try:
        return [forward_and_backward(case, cp) for case in cases]
    finally:
        tf.unregister()


def forward_and_backward(case, cp):
    model = case.model("distflash")
    out = model(**integration().shard_batch(case.inputs(), cp, case.whole))
    out.loss.backward()
    return results(model, out.logits, out.loss)


def dropped_on_rank(case, checkpointed):
    """Runs as a rank: as `forward_and_backward`, with attention dropout in training."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD)
    tf.register(cp)
    try:
        model = case.model("distflash").train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.3
        if checkpointed:
            enable_checkpointing(model, {"use_reentrant": False})
        out = model(**tf.shard_batch({**case.inputs(), "dropout_seed": 3}, cp))
        out.loss.backward()
        return results(model, out.logits, out.loss)
    finally:
        tf.unregister()


@pytest.mark.timeout(300)
def test_attention_dropout_over_ranks_is_that_of_one(ranks_of):
    """One rank is compared with eager attention and the oracle's masks in tests/pure."""
    for case in (Case("llama", (1, 11, 25)), Case("mistral")):
        (one,) = ranks_of(1).run(dropped_on_rank, case, False)
        for world_size, checkpointed in ((2, False), (3, True)):
            parts = ranks_of(world_size).run(dropped_on_rank, case, checkpointed)
            got = joined(parts, df.Zigzag(), case.seq_len)
            assert max(relative(got[name], x) for name, x in one.items()) <= 1e-5
        assert relative(one["logits"], eager(case)["logits"]) > 0.01


def joined(parts, layout, seq_len):
    """What ranks have together: tokens in order, and the mean of losses and gradients, as DDP and FSDP take it."""
    order = torch.cat([layout.positions(seq_len, len(parts), rank) for rank in range(len(parts))]).argsort()
    whole = {name: torch.stack([part[name].float() for part in parts]).mean(0) for name in parts[0] if name != "logits"}
    return {"logits": torch.cat([part["logits"] for part in parts], 1)[:, order], **whole}


@pytest.mark.timeout(300)
@pytest.mark.covering(1, world_size=[1, 2, 3], layout=[df.Zigzag(), df.Contiguous()])
def test_float32_is_eager_on_one_rank(world_size, layout, ranks_of):
    cases = [Case(family, lengths) for family in CONFIGS for lengths in LENGTHS]
    require_eagers(cases, layout, ranks_of(world_size))


@pytest.mark.timeout(300)
@pytest.mark.covering(1, world_size=[1, 2, 3], layout=[df.Contiguous(), df.Zigzag()])
def test_chunks_images_and_prefixes_are_eagers_on_one_rank(world_size, layout, ranks_of):
    cases = [Case(family, lengths) for family in CONFIGS_OF_MASKS for lengths in LENGTHS]
    require_eagers(cases, layout, ranks_of(world_size))


def with_pictures():
    """A Gemma 3, a batch whose tokens stand for images, and the images."""
    case = Case("gemma3")
    batch = {name: x.clone() for name, x in case.inputs().items() if name != "position_ids"}
    is_image = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    is_image[:, 5:9] = is_image[:, 16:20] = True
    batch["input_ids"][batch["input_ids"] == 47] = 1
    batch["input_ids"][is_image], batch["labels"][is_image] = 47, -100
    batch["token_type_ids"] = is_image.long()
    return case, batch, torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def pictures_on_rank():
    """Runs as a rank: embeds the whole batch, images included, and passes on this rank's part of it."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD)
    case, batch, pixels = with_pictures()
    tf.register(cp)
    try:
        model = case.model({"text_config": "distflash", "vision_config": "eager"})
        embeds = model.get_input_embeddings()(batch["input_ids"])
        features = model.get_image_features(pixels).pooler_output
        embeds = embeds.masked_scatter((batch["input_ids"] == 47)[..., None], features)
        part = tf.shard_batch(batch, cp, whole=("token_type_ids",))
        del part["input_ids"]
        out = model(inputs_embeds=cp.shard(embeds), **part)
        out.loss.backward()
        return results(model, out.logits, out.loss)
    finally:
        tf.unregister()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 2])
def test_images_that_are_embedded_before_are_eagers(world_size, ranks_of):
    case, batch, pixels = with_pictures()
    model = case.model("eager")
    out = model(**batch, pixel_values=pixels, use_cache=False)
    out.loss.backward()
    expected = results(model, out.logits, out.loss)
    got = joined(ranks_of(world_size).run(pictures_on_rank), df.Zigzag(), case.seq_len)
    assert got.keys() == expected.keys() and any("vision_tower" in name for name in got)
    # Adding the same to all keys changes no attention: eager's gradient is rounding, too.
    errors = {name: relative(got[name], x) for name, x in expected.items() if "k_proj.bias" not in name and x.any()}
    assert max(errors.values()) <= 1e-5, errors


def require_eagers(cases, layout, ranks):
    by_rank = ranks.run(on_rank, cases, layout)
    for case, parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        got, expected = joined(parts, layout, case.seq_len), eager(case)
        assert got.keys() == expected.keys()
        errors = {name: relative(got[name], expected[name]) for name in expected}
        assert max(errors.values()) <= 1e-5, f"{case}: {errors}"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_bfloat16_is_as_exact_as_eagers(world_size, ranks_of):
    """Over all models and results: the same error, up to the tenth that tests/dense.py allows.

    And for none of them thrice the error, since one rounding more or less shows in a tensor of few elements. Those that
    eager has almost right by luck are measured by the model's median.
    """
    families = [*CONFIGS, "llama4"]  # whose scaled queries are rounded once more
    cases = [Case(family, lengths, dtype=torch.bfloat16) for family in families for lengths in LENGTHS]
    by_rank = ranks_of(world_size).run(on_rank, cases, df.Zigzag())
    ours, eagers = [], []
    for case, parts in zip(cases, zip(*by_rank, strict=True), strict=True):
        got, own, truth = joined(parts, df.Zigzag(), case.seq_len), eager(case), eager(case, torch.float32)
        bars = {name: relative(own[name], truth[name]) for name in truth}
        median = sorted(bars.values())[len(bars) // 2]
        for name, bar in bars.items():
            error = relative(got[name], truth[name])
            assert error <= 3 * max(bar, median), f"{case}: {name} {error}, eager {bar}, median {median}"
            ours.append(error)
            eagers.append(bar)
    assert math.hypot(*ours) <= 1.1 * math.hypot(*eagers)


def own_loss_on_rank(case, data):
    """Runs as a rank: `data` groups with a share of the batch each, and the loss that is the mean over all of it."""
    tf = integration()
    mesh = init_device_mesh("cpu", (data, dist.get_world_size() // data), mesh_dim_names=("data", "context"))
    cp = df.ContextParallel(mesh["context"])
    tf.register(cp)
    try:
        model = case.model("distflash")
        model.loss_function = tf.loss_function(cp, group=dist.group.WORLD)
        rows = slice(mesh.get_local_rank("data"), None, data)
        batch = {name: x[rows] for name, x in case.inputs().items()}
        out = model(**tf.shard_batch(batch, cp))
        out.loss.backward()
        return results(model, out.logits, out.loss)
    finally:
        tf.unregister()


@pytest.mark.parametrize(("world_size", "data"), [(3, 1), (2, 2)])
def test_the_loss_function_is_the_mean_over_all_ranks_on_each(world_size, data, ranks_of):
    case = Case("llama", (1, 11, 25))  # whose two sequences have different numbers of labels
    expected = eager(case)
    parts = ranks_of(world_size).run(own_loss_on_rank, case, data)
    for part in parts:
        assert relative(part["loss"], expected["loss"]) <= 1e-6
    for name in expected.keys() - {"logits"}:
        mean = torch.stack([part[name] for part in parts]).mean(0)
        assert relative(mean, expected[name]) <= 1e-5, name


def two_heads(model, inputs, tokens, losses):
    """Results of a loss of two tokens ahead: the second head is given the next token's embedding, too.

    tokens: the next ones. losses: of each head's logits.
    """
    torch.manual_seed(4)
    second = torch.nn.Linear(2 * model.config.hidden_size, model.config.vocab_size)
    out = model(**inputs, output_hidden_states=True)
    further = second(torch.cat([out.hidden_states[-1], model.get_input_embeddings()(tokens)], -1))
    loss = losses[0](out.logits) + 0.3 * losses[1](further)
    loss.backward()
    return results(torch.nn.ModuleList([model, second]), torch.cat([out.logits, further], -1), loss)


def two_heads_on_rank(case, layout):
    """Runs as a rank."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD, layout)
    tf.register(cp)
    try:
        part = tf.shard_batch(case.inputs(), cp, shifts=(1, 2))
        ahead, mean = part["shifted"], tf.loss_function(cp)
        losses = [partial(mean, shift_labels=ahead.labels[by], distflash=part["distflash"]) for by in (1, 2)]
        return two_heads(case.model("distflash"), part, ahead.tokens[1], losses)
    finally:
        tf.unregister()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_losses_of_several_tokens_ahead_are_one_processs(lengths, ranks_of):
    case = Case("llama", lengths)
    whole = case.inputs()

    def ahead(name, by, fill):  # in each document by itself
        parts = whole[name].split(lengths, 1)
        return torch.cat([torch.cat([x[:, by:], torch.full_like(x[:, :by], fill)], 1) for x in parts], 1)

    def mean(logits, labels):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    losses = [partial(mean, labels=ahead("labels", by, -100)) for by in (1, 2)]
    inputs = {**whole, "use_cache": False}  # with a cache the library would not part the documents
    expected = two_heads(case.model("eager"), inputs, ahead("input_ids", 1, 0), losses)
    for world_size, layout in ((2, df.Zigzag()), (3, df.Contiguous())):
        parts = ranks_of(world_size).run(two_heads_on_rank, case, layout)
        got = joined(parts, layout, case.seq_len)
        assert got.keys() == expected.keys() and {"1.weight", "1.bias"} <= got.keys()
        errors = {name: relative(got[name], x) for name, x in expected.items()}
        assert max(errors.values()) <= 1e-5, errors


def wrapped_on_rank(case, wrap):
    """Runs as a rank: the gradients of a wrapped, checkpointed model with its own loss, put together again."""
    tf = integration()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cp = df.ContextParallel(mesh)
    tf.register(cp)
    try:
        model = case.model("distflash").train()
        enable_checkpointing(model, {"use_reentrant": False, "context_fn": df.keep_attention})
        wrapped = wrap(model, mesh)
        out = wrapped(**tf.shard_batch(case.inputs(), cp))
        out.loss.backward()
        gradients = {name: getattr(p.grad, "full_tensor", p.grad.clone)() for name, p in model.named_parameters()}
        return {"loss": cp.mean(out.loss.detach(), 1, reduction="mean"), **gradients}
    finally:
        tf.unregister()


def fsdp(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def ddp(model, mesh):
    return DistributedDataParallel(model)


@pytest.mark.parametrize("wrap", [fsdp, ddp])
def test_what_fsdp_and_ddp_average_is_eagers(wrap, ranks_of):
    case = Case("gpt_oss", (1, 11, 25))
    expected = eager(case)
    for got in ranks_of(2).run(wrapped_on_rank, case, wrap):
        assert all(relative(value, expected[name]) <= 1e-5 for name, value in got.items())


def without_position_ids(batch, cp):
    part = integration().shard_batch(batch, cp)
    return {name: x for name, x in part.items() if name != "position_ids"}


def of_another_batch(batch, cp):
    return integration().shard_batch({**batch, "input_ids": batch["input_ids"] + 1}, cp)


def with_types_of_its_tokens(batch, cp):
    return integration().shard_batch(batch, cp)


def with_other_types(batch, cp):
    types = 1 - batch["token_type_ids"]
    return integration().shard_batch({**batch, "token_type_ids": types}, cp, whole=("token_type_ids",))


def with_other_labels(batch, cp):
    return integration().shard_batch({**batch, "labels": batch["labels"].roll(1, 0)}, cp)


def sharded_by_hand_before(batch, cp):
    return integration().shard_batch({"input_ids": cp.shard(batch["input_ids"])}, cp)


def with_padding(batch, cp):
    part = integration().shard_batch(batch, cp)
    return {**part, "attention_mask": part["attention_mask"].tril()}


def unsharded(batch, cp):
    return batch


def on_rank_with_mistake(mistake, family):
    """Runs as a rank: what rank 1's mistake makes of a call, as the text of the error."""
    tf = integration()
    cp = df.ContextParallel(dist.group.WORLD)
    case = Case(family)
    tf.register(cp)
    try:
        prepare = mistake if cp.rank == 1 else partial(tf.shard_batch, whole=case.whole)
        with pytest.raises(ValueError) as error:
            case.model("distflash")(**prepare(case.inputs(), cp))
        return str(error.value)
    finally:
        tf.unregister()


@pytest.mark.parametrize(
    ("mistake", "on_rank_1", "on_rank_0"),
    [
        (
            unsharded,
            r"batch: nothing that shard_batch adds .* model\(\*\*shard_batch\(batch, cp\)\)",
            "rank 1 refused this call",
        ),
        (with_padding, "attention_mask: has zeros", "rank 1 refused this call"),
        (without_position_ids, "position_ids: are not those of this rank's tokens", "rank 1 refused this call"),
        (of_another_batch, "input_ids differs between rank 0 and rank 1.*same whole batch", "input_ids differs"),
        (with_other_labels, "labels differs between rank 0 and rank 1.*same whole batch", "labels differs"),
        (
            with_types_of_its_tokens,
            r"of a prefix\) from the types of 18 tokens, but the sequence has 37; .*whole=",
            "rank 1 refused this call",
        ),
        (with_other_types, "token_type_ids differs between rank 0 and rank 1.*same whole batch", "token_type_ids diff"),
        (sharded_by_hand_before, "seq_len is 37 on rank 0, 18 on rank 1.*called once", "seq_len is 37 on rank 0"),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_mistake_of_one_rank_stops_all(mistake, on_rank_1, on_rank_0, ranks_of):
    family = "paligemma" if "types" in mistake.__name__ else "llama"
    texts = ranks_of(2).run(on_rank_with_mistake, mistake, family)
    assert re.search(on_rank_1, texts[1]) and re.search(on_rank_0, texts[0]), texts


SCRIPT = ["launch/train_transformers.py", "--layers", "2", "--dim", "32", "--heads", "4", "--kv-heads", "2"]
SCRIPT += ["--device", "cpu", "--seq-len", "193", "--batch-size", "2", "--steps", "4", "--log-every", "1"]
SCRIPT += ["--warmup", "2", "--lr", "1e-2", "--vocab-size", "300"]


def train(ranks: int, *options: str, out: Path) -> list[float]:
    """The losses of all steps."""
    output = forked.finish(ranks, *SCRIPT, *options, "--out", out, timeout=300)
    assert re.search(r"median [\d,]+ tokens/s \| peak \d+\.\d+ GiB", output), output
    assert ("verified: sharded and unsharded agree" in output) is ("--verify" in options)
    assert (out / "loss.png").exists()
    return [metrics.loss for metrics in read_metrics(out / "metrics.jsonl")]


@pytest.mark.timeout(960)
def test_the_script_learns_alike_on_one_rank_over_two_and_after_a_resume(tmp_path):
    alone = train(1, "--loss-chunk", "0", out=tmp_path / "1")
    spread = "--loss-chunk", "50", "--checkpoint-activations", "--checkpoint-every", "2"
    over_two = train(2, *spread, "--verify", out=tmp_path / "2")
    assert len(alone) == 4 and alone[-1] < alone[0] - 0.3
    assert over_two == pytest.approx(alone, rel=1e-5)
    shutil.rmtree(tmp_path / "2" / "checkpoints" / "step-00000004")
    assert train(1, *spread, "--resume", out=tmp_path / "2") == pytest.approx(alone, rel=1e-5)
