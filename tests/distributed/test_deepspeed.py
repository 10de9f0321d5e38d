"""DeepSpeed on real processes: losses and weights equal those of one device; errors for users' mistakes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distflash as df
from distflash.recipes.config import ModelConfig, OptimizerConfig, TrainConfig
from distflash.recipes.reporting import read_metrics
from tests import forked
from tests.counting import Counting
from tests.damage import Attack, flip
from tests.jobs import ROOT
from tests.ranks import Ranks
from tests.training import (
    MAX_DOCUMENTS,
    SHAPE,
    Outcome,
    Run,
    assert_as_alone,
    join_deepspeed,
    make_decoder,
    make_optimizer,
    micro_batches,
)

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed: pip install 'distflash[deepspeed]'", allow_module_level=True)

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported, here and in the ranks

import distflash.integrations.deepspeed as dfd

PRELOAD = "deepspeed.pipe"
SECONDS, FULL_SECONDS = 240, 1500
CLIP = 1.02  # of gradients whose norms are between 0.6 and 2.8

RanksFor = Callable[[int, str], Ranks]


@pytest.fixture(scope="module")
def ranks_for(pytestconfig: pytest.Config) -> Iterator[RanksFor]:
    """Ranks by their number and what they are for: an engine may find what DeepSpeed keeps of one before it."""
    started: dict[tuple[int, str], Ranks] = {}
    seconds = FULL_SECONDS if pytestconfig.getoption("--full") else SECONDS
    yield lambda count, purpose: started.setdefault((count, purpose), Ranks(count, "gloo", timeout=seconds))
    for ranks in started.values():
        ranks.stop()


# --- Training equals one device ---


def combinations(pipe: int, data: int, stages: Sequence[int], full: bool) -> list[Run]:
    """For every stage of ZeRO: SGD and AdamW, both layouts, with documents and without; all of these where ``full``."""
    every = [
        Run(optimizer, documents, clip=CLIP, pipe=pipe, data=data, stage=stage, layout=layout)
        for stage, optimizer, documents, layout in product(
            stages, ("SGD", "AdamW"), (True, False), (df.Zigzag(), df.Contiguous())
        )
    ]
    # One of the eight of each stage: two stages differ in everything, over four all pairs of settings occur.
    chosen = (0, 7) if len(stages) == 2 else (0, 3, 5, 6)
    return every if full else [every[8 * n + chosen[n]] for n in range(len(stages))]


@pytest.mark.timeout(FULL_SECONDS)
@pytest.mark.parametrize(
    ("pipe", "data", "stages"),
    [(1, 1, (0, 1, 2, 3)), (2, 1, (0, 1)), (1, 2, (0, 3)), (2, 2, (0, 1))],
    ids=["context 2", "pipe 2 x context 2", "data 2 x context 2", "pipe 2 x data 2 x context 2"],
)
def test_training_equals_one_device(
    pipe: int, data: int, stages: tuple[int, ...], ranks_for: RanksFor, pytestconfig: pytest.Config
) -> None:
    full = pytestconfig.getoption("--full")
    runs = combinations(pipe, data, (0, 1, 2, 3) if full and pipe == 1 else stages, full)
    train_and_compare(ranks_for(2 * pipe * data, "pipelines" if pipe > 1 else "models"), runs)


def train_and_compare(ranks: Ranks, runs: Sequence[Run]) -> None:
    by_rank = ranks.run(train, runs)
    for run, outcomes in zip(runs, zip(*by_rank, strict=True), strict=True):
        assert_as_alone(run, outcomes)


def train(runs: Sequence[Run]) -> list[Outcome]:
    """As a rank: the runs one after the other."""
    join_deepspeed()
    return [train_pipeline(run) if run.pipe > 1 else train_whole(run) for run in runs]


def make_topology(run: Run, kernel: df.kernels.Kernel | None = None) -> dfd.Topology:
    return dfd.Topology(pipe=run.pipe, data=run.data, context=run.context, layout=run.layout, kernel=kernel)


def make_config(run: Run) -> dict[str, object]:
    return {
        "train_batch_size": run.micro_batches * run.data,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": run.clip,
        # Small parameters are gathered and freed as large ones are.
        "zero_optimization": {"stage": run.stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,  # SGD
        "steps_per_print": 10**6,
    }


def train_whole(run: Run, kernel: df.kernels.Kernel | None = None) -> Outcome:
    import deepspeed

    topology = make_topology(run, kernel)
    model = make_decoder(topology.cp, run.checkpoint)
    optimizer = make_optimizer(run, list(model.parameters()))
    engine, *_ = dfd.initialize(topology, model=model, config=make_config(run), optimizer=optimizer)
    shard, loss_fn = dfd.ShardBatch(topology.cp, run.seq_len), dfd.CausalLoss(topology)
    losses: list[float] = []
    for inputs, labels in map(shard, micro_batches(run, topology.data_rank)):
        tokens, mask = inputs, None
        if run.documents:
            tokens, mask = inputs[0], df.Causal() & df.Documents(inputs[1])
        loss = loss_fn(engine(tokens, run.seq_len, mask), labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine.destroy()
    return Outcome(torch.tensor(losses).view(run.steps, -1).mean(1).tolist(), weights)


def train_pipeline(run: Run) -> Outcome:
    pipeline = Pipeline(run)
    batches = micro_batches(run, pipeline.topology.data_rank)
    losses = [pipeline.engine.train_batch(batches).item() for _ in range(run.steps)]
    return Outcome(losses, pipeline.weights())


class Pipeline:
    """The decoder on the stages of a pipeline; tied, its embedding is the head as well."""

    def __init__(self, run: Run, kernel: df.kernels.Kernel | None = None) -> None:
        from deepspeed.pipe import TiedLayerSpec

        from distflash.recipes.pipeline import pipeline_layers

        self.topology = make_topology(run, kernel)
        self.decoder = make_decoder(self.topology.cp)
        layers = pipeline_layers(self.decoder, self.topology.cp, run.seq_len)
        if run.tied:
            tied = "embedding", dfd.Embedding, *self.decoder.embedding.weight.shape
            norm = dfd.TokenWise(lambda: self.decoder.norm)
            layers[0] = TiedLayerSpec(*tied)
            layers[-1:] = [norm, TiedLayerSpec(*tied, forward_fn=dfd.Embedding.logits)]
        self.model = dfd.pipeline_module(
            self.topology,
            layers,
            loss_fn=dfd.CausalLoss(self.topology),
            activation_checkpoint_interval=int(run.checkpoint),
        )
        self.tied = dict(self.model.tied_modules.items())
        for module in self.tied.values():
            module.load_state_dict(self.decoder.embedding.state_dict())
        optimizer, config = make_optimizer(run, list(self.model.parameters())), make_config(run)
        if run.stage == 0:
            dfd.clip_gradients(optimizer, self.model, config["gradient_clipping"])
            config["gradient_clipping"] = 0
        self.engine, *_ = dfd.initialize(self.topology, model=self.model, config=config, optimizer=optimizer)
        documents = MAX_DOCUMENTS if run.documents else None
        self.engine.set_batch_fn(dfd.ShardBatch(self.topology.cp, run.seq_len, max_documents=documents))

    def weights(self) -> dict[str, Tensor]:
        """Those of this stage, by the decoder's names."""
        mine = {id(p) for p in self.model.parameters()}
        named = [(name, p) for name, p in self.decoder.named_parameters() if id(p) in mine]
        named += [("embedding.weight", module.weight) for module in self.tied.values()]
        return {name: p.detach().clone() for name, p in named}


# --- What users of DeepSpeed expect of a pipeline ---


def test_tied_embeddings_and_checkpointed_activations(ranks_for: RanksFor) -> None:
    runs = [
        Run("SGD", documents=True, clip=CLIP, tied=True, pipe=2, stage=0, checkpoint=True),
        Run("AdamW", documents=False, clip=CLIP, tied=True, pipe=2, stage=1, checkpoint=True),
    ]
    train_and_compare(ranks_for(4, "pipelines"), runs)


def test_evaluates_and_resumes(ranks_for: RanksFor, tmp_path: Path) -> None:
    run = Run("AdamW", documents=True, clip=CLIP, pipe=2, stage=1, steps=8)
    for losses, evaluated, resumed in ranks_for(4, "pipelines").run(evaluate_and_resume, run, tmp_path):
        assert evaluated == losses[4]  # both are of the weights after step 4
        assert resumed == losses[5:]


def evaluate_and_resume(run: Run, folder: Path) -> tuple[list[float], float, list[float]]:
    join_deepspeed()
    first = Pipeline(run)
    place = first.topology.data_rank
    batches = micro_batches(run, place)
    losses = [first.engine.train_batch(batches).item() for _ in range(4)]
    evaluated = first.engine.eval_batch(micro_batches(run, place, first=4)).item()
    losses.append(first.engine.train_batch(batches).item())
    first.engine.save_checkpoint(folder, tag="five")
    losses += [first.engine.train_batch(batches).item() for _ in range(5, run.steps)]

    second = Pipeline(run)
    with torch.no_grad():
        for p in second.model.parameters():
            p.fill_(torch.nan)
    path, _ = second.engine.load_checkpoint(folder)
    assert path is not None
    batches = micro_batches(run, place, first=5)
    return losses, evaluated, [second.engine.train_batch(batches).item() for _ in range(5, run.steps)]


@pytest.mark.parametrize(("pipe", "stage"), [(2, 0), (1, 3)], ids=["pipeline", "ZeRO-3"])
def test_checkpointed_activations_keep_attention(pipe: int, stage: int, ranks_for: RanksFor) -> None:
    run = Run(pipe=pipe, stage=stage, micro_batches=3, steps=1, checkpoint=True)
    ranks = ranks_for(2 * pipe, "pipelines" if pipe > 1 else "models")
    for forwards, passes in ranks.run(count_forwards, run):
        assert forwards == run.micro_batches * passes * SHAPE.layers // pipe


def count_forwards(run: Run) -> tuple[int, int]:
    """How often a step ran attention's kernel forward, and in how many passes one attention does."""
    join_deepspeed()
    kernel = Counting()
    if run.pipe > 1:
        Pipeline(run, kernel=kernel).engine.train_batch(micro_batches(run, 0))
    else:
        train_whole(run, kernel)
    return kernel.forwards, len(make_topology(run).cp.plan(df.Causal(), run.seq_len).passes)


# --- Mistakes ---

# By mistake: what the error says on every rank.
SAYS = {
    "no divisor": "context: 1 stages x 3 ranks for a sequence do not divide the 2 ranks",
    "no product": "data: .* leave data out, or set it to 2",
    "no number": "context: expected a number of ranks, an int of at least 1, got 0",
    "mpu": "mpu: DeepSpeed would sum gradients",
    "mesh_param": "mesh_param: DeepSpeed would not combine",
    "training_data": r"training_data: .* sampler=topology\.sampler\(dataset\)",
    "no pipeline": "model: Decoder is no PipelineModule, but the topology has 2 stages",
    "ZeRO-3 pipeline": "stage 3 .* set the stage to 1, or pipe to 1",
    "clipping": '"gradient_clipping": is 1.0, its default .* norm of the first stage',
    "axis for context": r"axes \['pipe', 'data', 'context'\]; .* does not average",
    "reentrant": "activation_checkpoint_interval: 1 would checkpoint TokenWise, the first layer",
    "few layers": "layers: 1 are fewer than the 2 stages",
    "empty stage": "model: stage . of 2 has no layer",
    "stages twice": "num_stages: is given by the topology",
    "other batches": "batch differs between rank 0 and rank 1.* give each of them the same whole batch",
    "sharded twice": "tokens: 4 are a rank's part of seq_len=8, so this batch was sharded before",
    "one refuses": "tokens: expected whole sequences|batch: rank 1 refused",
    "not shifted": "labels: are the tokens themselves; .* shift_labels",
    "not sharded": "tokens: 8 on this rank, but Zigzag.. gives rank . of 2 4 of seq_len=8",
    "two engines": "model: is no pipeline, but DeepSpeed still has the groups of another engine",
}


def test_mistakes_are_named_on_every_rank(ranks_for: RanksFor) -> None:
    for said in ranks_for(2, "mistakes").run(make_mistakes):
        assert said.keys() == SAYS.keys()
        for name, text in said.items():
            assert re.search(SAYS[name], text), f"{name}: {text}"


def make_mistakes() -> dict[str, str]:
    """As a rank: what each says."""
    join_deepspeed()
    whole, staged = dfd.Topology(context=2), dfd.Topology(pipe=2, context=1)
    said = {}
    for name, mistake in {
        **topology_mistakes(),
        **engine_mistakes(whole, staged),
        **pipeline_mistakes(whole, staged),
        **batch_mistakes(whole),
        # Last, since it leaves an engine behind.
        "two engines": lambda: (initialize(as_pipeline(staged), staged), initialize(decoder_of(whole), whole)),
    }.items():
        try:
            mistake()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


Mistakes = dict[str, Callable[[], object]]


def topology_mistakes() -> Mistakes:
    return {
        "no divisor": lambda: dfd.Topology(context=3),
        "no product": lambda: dfd.Topology(context=1, data=3),
        "no number": lambda: dfd.Topology(context=0),
    }


def engine_mistakes(whole: dfd.Topology, staged: dfd.Topology) -> Mistakes:
    return {
        "mpu": lambda: initialize(decoder_of(whole), whole, mpu=object()),
        "mesh_param": lambda: initialize(decoder_of(whole), whole, mesh_param=(1, 2)),
        "training_data": lambda: initialize(decoder_of(whole), whole, training_data=[1]),
        "no pipeline": lambda: initialize(decoder_of(staged), staged),
        "ZeRO-3 pipeline": lambda: initialize(as_pipeline(staged), staged, {"zero_optimization": {"stage": 3}}),
        "clipping": lambda: initialize(as_pipeline(staged), staged, {"train_micro_batch_size_per_gpu": 1}),
    }


def pipeline_mistakes(whole: dfd.Topology, staged: dfd.Topology) -> Mistakes:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.activation_checkpointing.checkpointing import checkpoint

    reentrant = {"activation_checkpoint_interval": 1, "activation_checkpoint_func": checkpoint}
    return {
        "axis for context": lambda: initialize(with_an_axis_for_context(whole), whole),
        "reentrant": lambda: initialize(as_pipeline(staged, **reentrant), staged),
        "few layers": lambda: dfd.pipeline_module(staged, [nn.Identity()]),
        "empty stage": lambda: initialize(PipelineModule([nn.Linear(2, 2)], topology=staged), staged),
        "stages twice": lambda: as_pipeline(staged, num_stages=2),
    }


def batch_mistakes(whole: dfd.Topology) -> Mistakes:
    shard, tokens = dfd.ShardBatch(whole.cp, seq_len=8), torch.arange(16).view(2, 8)
    labels, rank = dfd.shift_labels(tokens), whole.cp.rank
    block = dfd.DecoderBlock(lambda: decoder_of(whole).blocks[0], cp=whole.cp, seq_len=8)
    return {
        "other batches": lambda: shard((tokens + rank, labels + rank)),
        "sharded twice": lambda: shard(shard((tokens, labels))),
        "one refuses": lambda: shard((tokens[:, rank:], labels[:, rank:])),
        "not shifted": lambda: shard((tokens, tokens)),
        "not sharded": lambda: block(torch.zeros(2, 8, SHAPE.dim)),
    }


def decoder_of(topology: dfd.Topology) -> nn.Module:
    return make_decoder(topology.cp)


def as_pipeline(topology: dfd.Topology, **options: object) -> nn.Module:
    from distflash.recipes.pipeline import pipeline_layers

    return dfd.pipeline_module(topology, pipeline_layers(make_decoder(topology.cp), topology.cp, 8), **options)


def with_an_axis_for_context(topology: dfd.Topology) -> nn.Module:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import ProcessTopology

    from distflash.recipes.pipeline import pipeline_layers

    axes = ProcessTopology(axes=["pipe", "data", "context"], dims=[1, 1, 2])
    return PipelineModule(pipeline_layers(make_decoder(topology.cp), topology.cp, 8), topology=axes)


def initialize(model: nn.Module, topology: dfd.Topology, config: object = None, **arguments: object) -> object:
    config = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 0} if config is None else config
    optimizer = make_optimizer(Run(), [*model.parameters(), nn.Parameter(torch.zeros(1))])
    return dfd.initialize(topology, model=model, config=config, optimizer=optimizer, **arguments)


# --- The job ---

JOB_STEPS = 6
TINY = {"layers": 2, "dim": 32, "heads": 4, "kv_heads": 2}
CONFIGS = ROOT / "launch" / "configs"


@pytest.mark.parametrize(
    ("name", "options", "model"),
    [
        ("zero1", {"data_parallel": 2, "micro_batch_size": 2, "batch_size": 8}, {}),
        ("zero3", {"layout": "contiguous"}, {"checkpoint_activations": True}),
        ("pipeline", {"pipe": 2}, {"checkpoint_activations": True}),
    ],
)
def test_job_resumes_and_makes_the_losses_of_the_main_job(
    name: str, options: dict[str, object], model: dict[str, object], ranks_for: RanksFor, tmp_path: Path
) -> None:
    ranks = ranks_for(4, "pipelines" if "pipe" in options else "models")
    ranks.run(run_both_jobs, tmp_path, name, options, model)
    mine, main = (read_metrics(tmp_path / job / "metrics.jsonl") for job in ("deepspeed", "main"))
    assert [m.step for m in mine] == list(range(1, JOB_STEPS + 1))
    # As in test_train: a few roundings a step, which each step hands on.
    tolerance = 4 * JOB_STEPS * torch.finfo(torch.float32).eps
    for field in ("loss", "grad_norm", "lr"):
        expected = [getattr(m, field) for m in main]
        assert [getattr(m, field) for m in mine] == pytest.approx(expected, rel=tolerance), field


def run_both_jobs(out: Path, name: str, options: dict[str, object], model: dict[str, object]) -> None:
    """As a rank: the main job, and the DeepSpeed job, which is stopped after step 3 and resumed."""
    from distflash.recipes import deepspeed_trainer, trainer
    from distflash.recipes.deepspeed_config import DeepSpeedConfig

    join_deepspeed()
    common = {
        "batch_size": 4,
        "seq_len": 193,
        "steps": JOB_STEPS,
        "checkpoint_every": 3,
        "device": "cpu",
        "model": ModelConfig(**TINY, **model),
        "optimizer": OptimizerConfig(lr=1e-2, warmup=2),
    } | options
    shared = {key: value for key, value in common.items() if key not in ("pipe", "micro_batch_size")}
    main, device = TrainConfig(out=out / "main", **shared), torch.device("cpu")
    corpus = trainer.agree(main)
    assert corpus is not None and trainer.train(main, corpus, device) == 0
    path = CONFIGS / f"{name}.json"
    config = DeepSpeedConfig(out=out / "deepspeed", deepspeed=path, **common)
    assert deepspeed_trainer.train(config, corpus, device) == 0
    if dist.get_rank() == 0:
        shutil.rmtree(config.out / "checkpoints" / f"step-{JOB_STEPS:08d}")
    dist.barrier()
    assert deepspeed_trainer.train(replace(config, resume=True), corpus, device) == 0


@pytest.mark.parametrize("damage", ["flipped", "forged", "another stage"])
def test_a_checkpoint_that_is_damaged_or_forged_is_refused_on_all_ranks(
    damage: str, ranks_for: RanksFor, tmp_path: Path
) -> None:
    expected = {"flipped": "is damaged", "forged": "may run code when loaded", "another stage": "resume with"}[damage]
    first, second = ranks_for(2, "models").run(resume_what_is_not_sound, tmp_path, damage)
    assert first[0] == second[0] == 2 and not (tmp_path / "executed").exists()
    assert len(first[1]) == 1 and expected in first[1][0] and second[1] == []


def resume_what_is_not_sound(out: Path, damage: str) -> tuple[int, list[str]]:
    """As a rank: write a checkpoint, spoil it on the first rank, and resume from it."""
    from distflash.recipes import deepspeed_trainer, manifest, trainer
    from distflash.recipes.deepspeed_config import DeepSpeedConfig
    from distflash.recipes.together import end, on_lead

    join_deepspeed()
    device = torch.device("cpu")
    config = DeepSpeedConfig(
        out=out, deepspeed=CONFIGS / "zero1.json", seq_len=65, steps=1, device="cpu", model=ModelConfig(**TINY)
    )
    corpus = trainer.agree(config)
    assert deepspeed_trainer.train(config, corpus, device) == 0
    folder = out / "checkpoints" / "step-00000001"
    file = next((folder / "state").glob("*optim_states.pt"))
    if damage == "flipped":
        on_lead(lambda: flip(file))
    elif damage == "forged":
        on_lead(lambda: torch.save({"attack": Attack(out / "executed")}, file))
        manifest.seal(folder, manifest.read(folder).writer, 1)
    else:
        config = replace(config, deepspeed=CONFIGS / "zero3.json")
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = end(lambda: deepspeed_trainer.train(replace(config, steps=2, resume=True), corpus, device))
    lines = [line for line in errors.getvalue().splitlines() if line.startswith("error")]
    return code, lines


def test_weights_only_holds_for_callers_who_ask_for_all(tmp_path: Path) -> None:
    from distflash.recipes.deepspeed_checkpoint import weights_only

    mark, file = tmp_path / "executed", tmp_path / "x.pt"
    torch.save({"attack": Attack(mark)}, file)
    with weights_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(file, weights_only=False)
    assert not mark.exists()
    torch.load(file, weights_only=False)  # afterwards callers have what they ask for
    assert mark.exists()


def test_job_starts_as_users_start_it(tmp_path: Path) -> None:
    options = "--device cpu --layers 2 --dim 32 --seq-len 193 --batch-size 2 --steps 2 --log-every 1"
    options += f" --verify --deepspeed launch/configs/zero3.json --out {tmp_path}"
    output = forked.finish(2, "launch/train_deepspeed.py", *options.split(), timeout=250)
    assert "DeepSpeed: zero3.json, ZeRO-3, 2 micro-batches of 1" in output
    assert "verified: sharded and unsharded agree" in output
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 2
    assert (tmp_path / "loss.png").stat().st_size > 10_000
