"""Parts of the main job without ranks: text, batches, FLOPs, learning rate, checkpoints, options."""

import json
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import distflash as df
from distflash.recipes.checkpoint import Checkpoints
from distflash.recipes.config import ModelConfig, OptimizerConfig, TrainConfig
from distflash.recipes.data import Corpus, open_corpus
from distflash.recipes.deepspeed_config import DeepSpeedConfig
from distflash.recipes.model import Decoder, flops_per_token
from distflash.recipes.optimizer import Gradients, learning_rate
from distflash.recipes.options import parse
from distflash.recipes.together import Refused
from distflash.recipes.trainer import check_out
from distflash.recipes.transformers_config import TransformersConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """abc, an empty file, defgh; a binary and a hidden file that must not be read."""
    for name, text in [
        ("a.txt", b"abc"),
        ("b.txt", b""),
        ("sub/c.txt", b"defgh"),
        ("d.bin", b"\0x"),
        (".git/x", b"no"),
    ]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text)
    return open_corpus(tmp_path, seq_len=4)


def test_documents_are_separated_and_windows_cross_them(corpus: Corpus) -> None:
    whole = b"abc\0\0defgh\0"
    assert corpus.size == len(whole)
    for start in range(len(whole)):
        for stop in range(start, len(whole) + 1):
            assert corpus.read(start, stop - start).tobytes() == whole[start:stop]


@pytest.mark.parametrize("layout", [df.Zigzag(), df.Contiguous(), df.Striped()])
@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shards_of_a_batch_are_the_batch(layout: df.Layout, world: int) -> None:
    corpus, seq_len = open_corpus(None, 193), 193
    whole, following = corpus.batch(seed=1, step=7, batch_size=2, seq_len=seq_len, positions=torch.arange(seq_len))
    assert torch.equal(whole[:, 1:], following[:, :-1])
    for rank in range(world):
        positions = layout.positions(seq_len, world, rank)
        tokens, labels = corpus.batch(seed=1, step=7, batch_size=2, seq_len=seq_len, positions=positions)
        assert torch.equal(tokens, whole[:, positions]) and torch.equal(labels, following[:, positions])


def test_shares_of_a_batch_are_the_batch() -> None:
    corpus, positions = open_corpus(None, 64), torch.arange(64)
    options = dict(seed=1, step=7, batch_size=6, seq_len=64, positions=positions)
    whole = corpus.batch(**options)
    shares = [corpus.batch(**options, share=(n, 3)) for n in range(3)]
    for part, tensor in enumerate(whole):
        rows = [row for share in shares for row in share[part]]
        assert len(rows) == 6 and all(any(torch.equal(row, other) for other in rows) for row in tensor)


def test_batches_depend_on_seed_and_step() -> None:
    corpus, positions = open_corpus(None, 64), torch.arange(64)
    first, again, later, other = (
        corpus.batch(seed=seed, step=step, batch_size=1, seq_len=64, positions=positions)[0]
        for seed, step in [(0, 0), (0, 0), (0, 1), (1, 0)]
    )
    assert torch.equal(first, again) and not torch.equal(first, later) and not torch.equal(first, other)


def test_text_that_fits_exactly_is_taken_and_one_token_more_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"x" * 9)
    only = open_corpus(text, seq_len=9).batch(seed=0, step=0, batch_size=1, seq_len=9, positions=torch.arange(9))
    assert bytes(only[0][0].tolist()) == b"x" * 9 and bytes(only[1][0].tolist()) == b"x" * 8 + b"\0"
    with pytest.raises(ValueError, match=r"--seq-len: 10 tokens need 11 bytes .* at most 9"):
        open_corpus(text, seq_len=10)


def test_missing_and_empty_data_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--data: .* does not exist"):
        open_corpus(tmp_path / "nowhere", 8)
    with pytest.raises(ValueError, match=r"--data: .* holds no text file"):
        open_corpus(tmp_path, 8)


def test_flops_are_those_of_the_matrices_and_the_allowed_pairs() -> None:
    config, seq_len = ModelConfig(layers=3, dim=32, heads=4, kv_heads=2, ffn=48), 10
    model = Decoder(config)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and name != "embedding.weight")
    pairs = sum(query + 1 for query in range(seq_len))
    forward = 2 * matrices * seq_len + 3 * 4 * config.heads * config.head_dim * pairs
    assert flops_per_token(config, seq_len) * seq_len == 3 * forward


def test_learning_rate_rises_then_falls() -> None:
    config = OptimizerConfig(lr=1.0, warmup=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step, 20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx(0.1)


def test_gradients_are_views_that_clip_together() -> None:
    model = Decoder(ModelConfig(layers=1, dim=16, heads=2, kv_heads=1))
    gradients = Gradients(model)
    model(torch.arange(8)[None], 8).sum().backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(gradients.flat, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients.clip(norm.item() / 2), norm, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients.flat.norm(), norm / 2, rtol=1e-5, atol=0)


def test_an_earlier_run_is_neither_lost_nor_invented(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path)
    check_out(config)
    with pytest.raises(ValueError, match=r"--resume: .* holds no checkpoint"):
        check_out(replace(config, resume=True))
    checkpoint = tmp_path / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"--out: .* --resume .* --overwrite"):
        check_out(config)
    check_out(replace(config, resume=True))
    check_out(replace(config, overwrite=True))


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    with checkpoints.writing(5, ModelConfig(dim=64), "test"):
        pass
    assert checkpoints.choose(ModelConfig(dim=64, checkpoint_activations=True), "test").step == 5
    with pytest.raises(Refused, match=r"--dim: got 128, but .* trained with 64"):
        checkpoints.choose(ModelConfig(dim=128), "test")


@given(position=st.floats(0, 1), bit=st.integers(0, 7), name=st.sampled_from(["a.bin", "sub/b.bin", "model.json"]))
def test_every_bit_of_a_checkpoint_counts(position: float, bit: int, name: str) -> None:
    with TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch), keep=2)
        with checkpoints.writing(5, ModelConfig(), "test") as folder:
            (folder / "sub").mkdir()
            (folder / "a.bin").write_bytes(bytes(range(256)))
            (folder / "sub/b.bin").write_bytes(b"b")
        path = Path(scratch) / "step-00000005" / name
        content = bytearray(path.read_bytes())
        content[round(position * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)
        with pytest.raises(Refused, match=re.escape(f"{path} is damaged")):
            checkpoints.choose(ModelConfig(), "test")


@given(position=st.floats(0, 1), bit=st.integers(0, 7))
def test_a_damaged_manifest_is_refused_or_says_the_same(position: float, bit: int) -> None:
    with TemporaryDirectory() as scratch:
        checkpoints = Checkpoints(Path(scratch), keep=2)
        with checkpoints.writing(5, ModelConfig(), "test"):
            pass
        path = Path(scratch) / "step-00000005" / "manifest.json"
        content = bytearray(path.read_bytes())
        before = json.loads(content)
        content[round(position * (len(content) - 1))] ^= 1 << bit
        path.write_bytes(content)
        try:
            checkpoints.choose(ModelConfig(), "test")
        except Refused as refusal:
            assert scratch in str(refusal)
        else:
            assert json.loads(content) == before


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3, 10):
        with checkpoints.writing(step, ModelConfig(), "test"):
            pass
    checkpoints.prune()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_commands_of_the_readme_write_to_folders_of_their_own() -> None:
    text = (ROOT / "README.md").read_text()
    jobs = re.findall(r"^distflash (train\S*) --ranks \d+(.*)", text, re.MULTILINE)
    kinds = {"train": TrainConfig, "train-deepspeed": DeepSpeedConfig, "train-transformers": TransformersConfig}
    assert {name for name, _ in jobs} == set(kinds)
    outs = [parse(kinds[name], shlex.split(options, comments=True)).out for name, options in jobs]
    assert len(set(outs)) == len(outs), outs


CONFIGS = "config", "deepspeed_config", "inference_config", "transformers_config", "uptrain_config"


def test_options_are_read_without_torch() -> None:
    modules = ", ".join(f"distflash.recipes.{name}" for name in ("options", *CONFIGS))
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("job", ["train", "train_deepspeed", "train_transformers", "uptrain", "generate", "evaluate"])
def test_help_says_the_time_and_survives_a_reader_that_leaves(job: str) -> None:
    script = [sys.executable, f"launch/{job}.py", "--help"]
    shown = subprocess.run(script, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert re.search(r"(minute|second)s? on two CPU cores", " ".join(shown.split())), shown
    ended = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ended.stdout is not None and ended.stderr is not None
    ended.stdout.close()
    assert ended.stderr.read() == "" and ended.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ModelConfig(heads=4, kv_heads=3), "--kv-heads: got 3"),
        (lambda: ModelConfig(dim=30, heads=4), "--dim: got 30 for 4 heads"),
        (lambda: OptimizerConfig(lr=0.0), "--lr: got 0.0"),
        (lambda: OptimizerConfig(lr=inf), "--lr: got inf, expected a positive, finite number"),
        (lambda: OptimizerConfig(lr=nan), "--lr: got nan"),
        (lambda: OptimizerConfig(weight_decay=inf), "--weight-decay: got inf"),
        (lambda: OptimizerConfig(weight_decay=nan), "--weight-decay: got nan"),
        (lambda: OptimizerConfig(grad_clip=nan), "--grad-clip: got nan"),
        (lambda: OptimizerConfig(grad_clip=inf), "--grad-clip: got inf"),
        (lambda: OptimizerConfig(beta1=nan), "--beta1: got nan"),
        (lambda: OptimizerConfig(min_lr_ratio=nan), "--min-lr-ratio: got nan"),
        (lambda: ModelConfig(rope_theta=0.0), "--rope-theta: got 0.0, expected a positive, finite number"),
        (lambda: ModelConfig(rope_theta=-1e4), "--rope-theta: got -10000.0"),
        (lambda: ModelConfig(rope_theta=inf), "--rope-theta: got inf"),
        (lambda: ModelConfig(rope_theta=nan), "--rope-theta: got nan"),
        (lambda: ModelConfig(layers=0), "--layers: got 0"),
        (lambda: ModelConfig(dim=-32), "--dim: got -32"),
        (lambda: ModelConfig(ffn=0), "--ffn: got 0"),
        (lambda: TrainConfig(seed=2**64), "--seed: got 18446744073709551616, expected 0 or more, and less than"),
        (lambda: TrainConfig(seed=-1), "--seed: got -1"),
        (lambda: TrainConfig(threads=2**40), "--threads: got"),
        (lambda: TrainConfig(out=Path("runs/caf\udce9")), r"--out: got runs/caf\\xe9, expected a name in UTF-8"),
        (lambda: DeepSpeedConfig(deepspeed=Path("setup.cfg")).for_deepspeed(), "--deepspeed: setup.cfg is no JSON"),
        (lambda: ModelConfig(recompute_attention=True), "--recompute-attention: got it alone"),
        (lambda: TrainConfig(seq_len=0), "--seq-len: got 0"),
        (
            lambda: TrainConfig(batch_size=3, data_parallel=2),
            "--batch-size: got 3, expected a multiple of the 2 groups",
        ),
        (lambda: TrainConfig(resume=True, overwrite=True), "--resume"),
    ],
)
def test_options_are_refused_by_name(make: object, words: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=words):
        make()


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="--nproc-per-node: got 3, expected at most 2"):
        TrainConfig()
    TrainConfig(device="cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    TrainConfig()
