"""The DeepSpeed integration without processes: configurations, layers, batches, replaced attention."""

import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint_sequential

import distflash as df

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install 'distflash[deepspeed]'", allow_module_level=True)

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import distflash.integrations.deepspeed as dfd
from distflash.integrations.deepspeed.config import Sizes, check_config, in_ranks, read_config
from distflash.integrations.deepspeed.layers import documents_of
from distflash.recipes.config import OptimizerConfig
from distflash.recipes.deepspeed_config import DeepSpeedConfig

S, DIM, HEADS = 23, 16, 4
ALONE = df.ContextParallel(df.transport.Alone())


def on_ranks(work: Callable[[df.ContextParallel], object], world_size: int = 2) -> list[object]:
    simulator = df.transport.Simulator(world_size)
    return simulator.run(lambda transport: work(df.ContextParallel(transport, kernel=df.kernels.Reference())))


# --- Configurations ---


@pytest.mark.parametrize(
    ("config", "pipe", "words"),
    [
        (
            {"sequence_parallel_size": 2},
            1,
            '"sequence_parallel_size" changes .* bookkeeping of batches and nothing else',
        ),
        ({"data_parallel_size": 2, "sequence_parallel_size": 2}, 1, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, 1, '"tensor_parallel" the axes are those of Topology'),
        ({"curriculum_learning": {"enabled": True}}, 1, '"curriculum_learning" cuts'),
        ({"zero_optimization": {"stage": 4}}, 1, "expected a stage of 0 to 3, got 4"),
        ({"zero_optimization": {"stage": 2}}, 2, "stage 2 .* set the stage to 1, or pipe to 1"),
        ({"gradient_clipping": 0.5}, 2, "gradient_clipping.*: is 0.5, but in float32"),
        ({}, 2, "is 1.0, its default where it is left out"),
        ({"gradient_allreduce_op": "sum"}, 1, "gradients that are averaged"),
        ({"train_batch_size": 3}, 1, "3 sequences, of which each of the 2 .* multiple of 2"),
        (
            # As DeepSpeed would count, with each sequence once for each of its 4 ranks.
            {"train_batch_size": 48, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            1,
            "2 in a micro-batch x 3 micro-batches x 2 groups are 12 sequences, however many ranks hold each",
        ),
    ],
)
def test_configurations_that_would_train_something_else_are_refused(config: dict, pipe: int, words: str) -> None:
    with pytest.raises(ValueError, match=f"config: .*{words}"):
        check_config(config, Sizes(pipe=pipe, data=2, context=4))


@pytest.mark.parametrize(
    ("config", "pipe"),
    [
        ({}, 1),
        ({"zero_optimization": {"stage": 3}, "gradient_clipping": 1.0}, 1),
        ({"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}, 2),
        ({"bf16": {"enabled": True}}, 2),
        ({"gradient_clipping": 0}, 2),
        ({"tensor_parallel": {"autotp_size": 0}, "curriculum_learning": {"enabled": False}}, 1),
        ({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3}, 1),
    ],
)
def test_configurations_that_deepspeed_does_right_are_taken(config: dict, pipe: int) -> None:
    check_config(config, Sizes(pipe=pipe, data=2, context=4))


def test_sequences_are_counted_once_however_many_ranks_hold_them() -> None:
    sizes = Sizes(pipe=2, data=2, context=4)
    counted = in_ranks({"train_batch_size": 12, "train_micro_batch_size_per_gpu": 2}, sizes)
    # DeepSpeed's rule: the batch is micro-batch x steps x data-parallel ranks, which are data x context.
    assert counted["train_batch_size"] == 2 * 3 * (2 * 4)
    assert in_ranks({"train_micro_batch_size_per_gpu": 2}, sizes) == {"train_micro_batch_size_per_gpu": 2}


def test_a_configuration_is_a_dict_or_a_file_and_stays_as_it_was(tmp_path: Path) -> None:
    given = {"zero_optimization": {"stage": 1}}
    path = tmp_path / "zero1.json"
    path.write_text(json.dumps(given))
    for config in (given, path, str(path)):
        own = read_config(config)
        own["zero_optimization"]["stage"] = 3
        assert given == json.loads(path.read_text()) == {"zero_optimization": {"stage": 1}}
    with pytest.raises(ValueError, match="config: expected a dict or the path of a JSON file"):
        read_config(tmp_path / "none.json")


# --- Layers ---


class Told(nn.Module):
    """A block that adds what it is told."""

    def forward(self, x: Tensor, *, mask: df.Mask, seq_len: int) -> Tensor:
        self.mask, self.seq_len = mask, seq_len
        return x + 1


def test_documents_travel_through_all_layers() -> None:
    padded = torch.tensor([0, 5, S, S, S])
    block = dfd.DecoderBlock(Told, cp=ALONE, seq_len=S, mask=df.Window(3))
    layers = [dfd.Embedding(32, DIM), block, dfd.TokenWise(nn.Linear, DIM, DIM)]
    stream = torch.arange(S)[None], padded
    for layer in layers:
        stream = layer(stream)
    logits, cu_seqlens = layers[0].logits(stream)
    assert logits.shape == (1, S, 32) and cu_seqlens is padded
    assert block.block.mask == df.Window(3) & df.Documents([0, 5, S]) and block.block.seq_len == S
    block(torch.zeros(1, S, DIM))
    assert block.block.mask == df.Window(3)


def test_padding_of_documents_is_no_document() -> None:
    assert documents_of(torch.tensor([0, 4, 9, 9])) == df.Documents([0, 4, 9])
    assert documents_of(torch.tensor([0, 9])) == df.Documents([0, 9])


def test_a_block_that_cannot_be_told_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear\.forward takes no mask and no seq_len"):
        dfd.DecoderBlock(nn.Linear, 2, 2, cp=ALONE, seq_len=S)


@pytest.mark.parametrize("length", [S, S // 4])
def test_a_block_refuses_a_batch_that_was_not_sharded_or_twice(length: int) -> None:
    def work(cp: df.ContextParallel) -> None:
        block = dfd.DecoderBlock(Told, cp=cp, seq_len=S)
        with pytest.raises(ValueError, match=f"tokens: {length} on this rank, but .* of seq_len={S}; shard whole"):
            block(torch.zeros(1, length, DIM))

    on_ranks(work)


def test_loss_refuses_labels_of_other_tokens() -> None:
    loss = dfd.CausalLoss(SimpleNamespace())
    with pytest.raises(ValueError, match=r"labels: expected one for each of the \[2, 3\] tokens .* got \[2, 6\]"):
        loss(torch.zeros(2, 3, 8), torch.zeros(2, 6, dtype=torch.int64))


# --- Batches ---

TOKENS = torch.arange(2 * S).view(2, S)


def test_a_batch_is_sharded_with_its_labels_and_documents() -> None:
    labels, ends = dfd.shift_labels(TOKENS), torch.tensor([0, 7, S])
    assert torch.equal(labels[:, :-1], TOKENS[:, 1:]) and bool((labels[:, -1] == -100).all())

    def work(cp: df.ContextParallel) -> None:
        positions = cp.positions(S)
        tokens, part = dfd.ShardBatch(cp, S)((TOKENS, labels))
        assert torch.equal(tokens, TOKENS[:, positions]) and torch.equal(part, labels[:, positions])
        (tokens, padded), part = dfd.ShardBatch(cp, S, max_documents=4)([[TOKENS, ends], labels])
        assert torch.equal(tokens, TOKENS[:, positions]) and padded.tolist() == [0, 7, S, S, S]

    on_ranks(work, 3)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (TOKENS, r"batch: expected \(tokens, labels\)"),
        ((TOKENS[0], TOKENS[0]), r"tokens: expected a tensor \[batch, seq_len\], got shape \[23\]"),
        ((TOKENS[:, :-1], TOKENS[:, 1:]), "tokens: expected whole sequences of seq_len=23, got 22"),
        ((TOKENS, TOKENS[:, 1:]), r"labels: expected a tensor \[2, 23\], as tokens, got shape \[2, 22\]"),
        ((TOKENS, TOKENS), "labels: are the tokens themselves"),
        ((TOKENS, TOKENS.masked_fill(TOKENS % 3 == 0, -100)), "labels: are the tokens themselves"),
        (((TOKENS, torch.tensor([[0, S]])), dfd.shift_labels(TOKENS)), "cu_seqlens: expected a tensor"),
        (((TOKENS, torch.tensor([0, 9])), dfd.shift_labels(TOKENS)), "cu_seqlens: end at 9, but seq_len is 23"),
        (((TOKENS, torch.tensor([0, 9, 5, S])), dfd.shift_labels(TOKENS)), "must not decrease"),
        (((TOKENS, torch.tensor([0, 1, 2, S])), dfd.shift_labels(TOKENS)), "3 documents are more than max_documents=2"),
    ],
)
def test_batches_that_are_not_whole_are_refused(batch: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dfd.ShardBatch(ALONE, S, max_documents=2)(batch)


def test_empty_documents_and_padding_do_not_count() -> None:
    given = torch.tensor([0, 9, 9, S, S, S])
    (_, ends), _ = dfd.ShardBatch(ALONE, S, max_documents=3)(((TOKENS, given), dfd.shift_labels(TOKENS)))
    assert ends.tolist() == [0, 9, S, S]


def test_labels_that_happen_to_equal_tokens_are_taken() -> None:
    same = torch.ones(1, S, dtype=torch.int64)
    dfd.ShardBatch(ALONE, S)((same, same))


# --- Attention of layers that there are already ---


class Core(nn.Module):
    """Attention alone, [batch, tokens, heads, head_dim]."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Layer(nn.Module):
    """Somebody's attention layer, with its core in a module or called directly."""

    def __init__(
        self, core: nn.Module | None, is_causal: bool = True, attn_mask: Tensor | None = None, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.core, self.is_causal, self.attn_mask, self.dropout = core, is_causal, attn_mask, dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).unbind(2)
        if self.core is not None:
            return self.out(self.core(q, k, v).flatten(2))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        p = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.attn_mask, dropout_p=p, is_causal=self.is_causal)
        return self.out(out.transpose(1, 2).flatten(2))


def model_with(core: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(Core() if core else None) for _ in range(2)))


def replace_core(model: nn.Module, cp: df.ContextParallel) -> None:
    dfd.replace_attention(model, Core, dfd.DistributedAttention(cp, df.Causal(), seq_len=S))


def redirect(model: nn.Module, cp: df.ContextParallel) -> list:
    order = dfd.Order(batch=0, heads=1, tokens=2)
    return dfd.redirect_attention(model, Layer, dfd.DistributedAttention(cp, df.Causal(), seq_len=S, order=order))


@pytest.mark.parametrize(("core", "wrap"), [(True, replace_core), (False, redirect)])
def test_wrapped_layers_compute_over_all_ranks_what_they_were(core: bool, wrap: Callable) -> None:
    x = torch.randn(2, S, DIM, generator=torch.Generator().manual_seed(1))
    plain = model_with(core).double()
    expected = plain(x.double())
    expected.square().sum().backward()

    def work(cp: df.ContextParallel) -> tuple[Tensor, list[Tensor]]:
        model = model_with(core).double()
        names = list(model.state_dict())
        wrap(model, cp)
        assert list(model.state_dict()) == names
        out = model(cp.shard(x.double()))
        out.square().sum().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    parts = on_ranks(work, 3)
    for rank, (out, _) in enumerate(parts):
        torch.testing.assert_close(out, expected[:, df.Zigzag().positions(S, 3, rank)].detach())
    for n, p in enumerate(plain.parameters()):
        torch.testing.assert_close(torch.stack([grads[n] for _, grads in parts]).sum(0), p.grad)


def dropping(cp: df.ContextParallel, seed: int | None) -> nn.Sequential:
    """Two equal layers with attention dropout."""
    model = nn.Sequential(*(Layer(None, dropout=0.3) for _ in range(2))).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(p.numel()))
    order = dfd.Order(batch=0, heads=1, tokens=2)
    attention = dfd.DistributedAttention(cp, df.Causal(), seq_len=S, order=order)
    attention.dropout_seed = seed
    dfd.redirect_attention(model, Layer, attention)
    return model


def test_dropout_of_redirected_layers_is_that_of_one_rank_and_differs_between_layers() -> None:
    x = torch.randn(2, S, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def work(cp: df.ContextParallel) -> tuple[Tensor, list[Tensor]]:
        model = dropping(cp, 5)
        out = checkpoint_sequential(model, 2, cp.shard(x), use_reentrant=False)
        out.square().sum().backward()
        return out.detach(), [p.grad for p in model.parameters()]

    one = dropping(ALONE, 5)
    expected = one(x)
    expected.square().sum().backward()
    parts = on_ranks(work, 3)
    for rank, (out, _) in enumerate(parts):
        torch.testing.assert_close(out, expected[:, df.Zigzag().positions(S, 3, rank)].detach())
    for n, p in enumerate(one.parameters()):
        torch.testing.assert_close(torch.stack([grads[n] for _, grads in parts]).sum(0), p.grad)
    first, second = dropping(ALONE, 5)
    assert not torch.equal(first(x), second(x))
    assert not torch.equal(dropping(ALONE, 6)(x), expected)
    assert torch.equal(dropping(ALONE, None).eval()(x), dropping(ALONE, 5).eval()(x))


def test_dropout_of_redirected_layers_needs_a_seed_of_the_step() -> None:
    x = torch.zeros(1, S, DIM, dtype=torch.float64)
    with pytest.raises(ValueError, match="dropout_p: the layer has attention dropout, for which all ranks need one"):
        dropping(ALONE, None)(x)
    with pytest.raises(ValueError, match=r"dropout_seed: expected an int from 0 to 2\*\*40 - 1, such as the step"):
        dropping(ALONE, 2**40)(x)


def test_attention_takes_dropout_and_a_seed() -> None:
    q = torch.randn(2, S, HEADS, 8)
    attend = dfd.DistributedAttention(ALONE, df.Causal(), seq_len=S)
    options = dict(dropout_p=0.3, dropout_seed=4)
    assert torch.equal(attend(q, q, q, **options), df.attention(q, q, q, mask=df.Causal(), **options))


def test_a_redirection_ends_with_the_forward_and_can_be_taken_back() -> None:
    model, x = model_with(False), torch.randn(1, S, DIM)
    expected = model(x)
    handles = redirect(model, ALONE)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(RuntimeError):  # an error within the forward leaves nothing behind
        model(torch.randn(1, S, DIM + 1))
    q = torch.randn(1, HEADS, 5, 4)
    F.scaled_dot_product_attention(q, q, q)  # a length that the redirection would refuse
    for handle in handles:
        handle.remove()
    assert torch.equal(model(x), expected)
    model(x[:, 1:])


def test_a_redirection_takes_a_mask_for_each_sequence() -> None:
    """Two sequences, of which the second has its documents apart."""
    documents, x = df.Documents([0, 5, S]), torch.randn(2, S, DIM)
    order = dfd.Order(batch=0, heads=1, tokens=2)

    def out(mask: df.Mask, x: Tensor) -> Tensor:
        model = model_with(False)
        dfd.redirect_attention(model, Layer, dfd.DistributedAttention(ALONE, mask, seq_len=S, order=order))
        return model(x)

    got = out(df.Causal() & df.Rows([df.Full(), documents]), x)
    alone = [out(df.Causal(), x[:1]), out(df.Causal() & documents, x[1:])]
    torch.testing.assert_close(got, torch.cat(alone))


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (lambda: Layer(None, is_causal=False), "is_causal: the layer calls attention with is_causal=False"),
        (
            lambda: Layer(None, is_causal=False, attn_mask=torch.ones(S, S).bool()),
            "attn_mask: is of this rank's tokens",
        ),
        (lambda: Layer(nn.Bilinear(1, 1, 1)), "made no call of scaled_dot_product_attention"),
    ],
)
def test_what_a_redirection_would_change_is_refused(layer: Callable[[], Layer], words: str) -> None:
    module = layer()
    if module.core is not None:
        module.core.forward = lambda q, k, v: v
    redirect(module, ALONE)
    with pytest.raises(ValueError, match=words):
        module(torch.zeros(1, S, DIM))


def test_attention_keeps_the_order_of_dimensions_and_refuses_the_rest() -> None:
    q, kv = torch.randn(S, 2, HEADS, 8), torch.randn(S, 2, 2, 8)  # Megatron: tokens, batch, heads, head_dim
    order = dfd.Order(tokens=0, batch=1)
    attend = dfd.DistributedAttention(ALONE, df.Causal(), seq_len=S, order=order)
    expected = df.attention(q.transpose(0, 1), kv.transpose(0, 1), kv.transpose(0, 1), mask=df.Causal())
    torch.testing.assert_close(attend(q, kv, kv, 1), expected.transpose(0, 1))
    attend(q, kv, kv, 1, None, attention_mask=None)
    with pytest.raises(ValueError, match="batch_dim_idx: got 0"):
        attend(q, kv, kv, 0)
    with pytest.raises(ValueError, match="argument 5, attention_mask: DistributedAttention takes q, k and v alone"):
        attend(q, kv, kv, 1, torch.zeros(1), attention_mask=torch.zeros(1))
    with pytest.raises(ValueError, match="batch, tokens and heads to be 0, 1 and 2"):
        dfd.Order(batch=0, tokens=0)


def test_only_modules_without_parameters_are_replaced() -> None:
    attend = dfd.DistributedAttention(ALONE, df.Causal(), seq_len=S)
    model = model_with(True)
    with pytest.raises(ValueError, match="kind: 0 has parameters, which would be lost"):
        dfd.replace_attention(model, Layer, attend)
    with pytest.raises(ValueError, match="Sequential has no MultiheadAttention in it"):
        dfd.replace_attention(model, nn.MultiheadAttention, attend)
    assert isinstance(model[0].core, Core)


# --- The job's options ---


def test_the_command_line_fills_in_what_the_json_leaves_open(tmp_path: Path) -> None:
    config = DeepSpeedConfig(batch_size=8, micro_batch_size=2, device="cpu", optimizer=OptimizerConfig(grad_clip=0.5))
    filled = config.for_deepspeed()
    assert filled["train_batch_size"] == 8 and filled["gradient_accumulation_steps"] == 4
    assert filled["gradient_clipping"] == 0.5 and filled["bf16"] == {"enabled": False}
    assert "auto" not in json.dumps(filled)

    own = tmp_path / "own.json"
    own.write_text(json.dumps({"gradient_clipping": 0.7}))
    with pytest.raises(ValueError, match=r'--grad-clip: got 1.0, expected the 0.7 of "gradient_clipping"'):
        DeepSpeedConfig(deepspeed=own).for_deepspeed()
    own.write_text(json.dumps({"optimizer": {"type": "Adam"}}))
    with pytest.raises(ValueError, match='--deepspeed: got "optimizer"'):
        DeepSpeedConfig(deepspeed=own).for_deepspeed()


def test_configurations_in_the_repository_fit_the_job() -> None:
    folder = Path(dfd.__file__).parents[3] / "launch" / "configs"
    assert {path.stem for path in folder.iterdir()} == {"zero1", "zero3", "pipeline"}
    for path in folder.iterdir():
        stages = 2 if path.stem == "pipeline" else 1
        check_config(DeepSpeedConfig(deepspeed=path).for_deepspeed(), Sizes(pipe=stages, data=1, context=2))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 6, "micro_batch_size": 4}, "--batch-size: got 6, expected a multiple of 4"),
        ({"deepspeed": Path("none.json")}, "--deepspeed: got none.json"),
        ({"pipe": 2}, "--pipe: got 2 with --data-parallel 1, expected a product that divides the 1 ranks"),
        ({"pipe": 0}, "--pipe: got 0"),
    ],
)
def test_options_are_refused_by_name(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DeepSpeedConfig(**options).check_ranks(1)
