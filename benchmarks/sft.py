"""SFTTrainer with context parallelism compared with a hand-written loop: tokens per second and memory, Llama 1.2B.

    torchrun --standalone --nproc-per-node 2 -m benchmarks.sft                   # packed documents, 128K tokens a step
    torchrun --standalone --nproc-per-node 2 -m benchmarks.sft --hybrid          # Qwen3.5-like, 64K: gathered layers
    torchrun --standalone --nproc-per-node 2 -m benchmarks.sft --tiny --device cpu

Both train the same weights on the same packed sequences, with FSDP2, activation checkpointing that keeps attention, a
loss in chunks, clipping and AdamW. The loop is that of `hand_loop`. Needs TRL.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from itertools import pairwise
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback

import distflash as df
from benchmarks import common
from benchmarks.hand_loop import CausalLM, checkpoint_layers, llama, shard_model
from benchmarks.layer_share import LayerShare
from distflash.integrations import transformers as dft

TRAINER, BY_HAND = "dft.SFTTrainer", "loop by hand"
# Steps that are left out of the rate: memory pools grow and kernels are compiled.
WARM_UP = 3
LOSS_CHUNK = 4096
CLIP = 1.0
# By how much losses of the two may differ, relatively: rounding, to which the steps before add theirs.
ALIKE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@dataclass(frozen=True)
class Bench:
    """What is trained on what. hybrid: three gated delta nets to each attention, instead of a Llama."""

    device: torch.device
    seq_len: int
    steps: int
    hybrid: bool
    tiny: bool
    lr: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if common.is_gpu(self.device) else torch.float32

    @property
    def layer(self) -> str:
        """The class of the layers, of which FSDP gathers one at a time."""
        return "Qwen3_5DecoderLayer" if self.hybrid else "LlamaDecoderLayer"

    def model(self) -> Any:
        """The same weights on every rank, in float32."""
        torch.manual_seed(0)
        with self.device:
            if self.hybrid:
                return AutoModelForCausalLM.from_config(self.hybrid_config(), attn_implementation=dft.NAME)
            sizes = (2, 64, 4, 2, 128) if self.tiny else (16, 2048, 32, 8, 8192)
            return llama(sizes, 512 if self.tiny else 128256, self.seq_len, dft.NAME)

    def hybrid_config(self) -> Any:
        from transformers import Qwen3_5TextConfig

        sizes = dict(vocab_size=128256, hidden_size=2048, intermediate_size=6144, num_hidden_layers=12, head_dim=256)
        heads = dict(num_attention_heads=8, num_key_value_heads=2, linear_num_key_heads=16, linear_num_value_heads=16)
        if self.tiny:
            sizes = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=4, head_dim=16)
            heads |= dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16)
            heads |= dict(linear_value_head_dim=16)
        return Qwen3_5TextConfig(**sizes, **heads, max_position_embeddings=self.seq_len, tie_word_embeddings=True)

    def documents(self) -> Any:
        """Random tokens, in documents of a 128th to a quarter of a sequence: enough for all steps."""
        from datasets import Dataset

        generator = torch.Generator().manual_seed(0)
        rows, left = [], (self.steps + 2) * self.seq_len
        while left > 0:
            length = int(torch.randint(self.seq_len // 128 + 2, self.seq_len // 4, (1,), generator=generator))
            rows.append({"input_ids": torch.randint(3, 500, (length,), generator=generator).tolist()})
            left -= length
        return Dataset.from_list(rows)


@dataclass
class Made:
    """Of each step: its loss, its seconds on this rank, its tokens. peak: bytes beyond what was there before."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak: int | None = None

    def rate(self, device: torch.device) -> float:
        """Tokens per second of the step in the middle, as the slowest rank sees it."""
        pairs = list(zip(self.tokens, self.seconds, strict=True))[min(WARM_UP, len(self.tokens) - 1) :]
        return min(common.over_ranks(median(n / s for n, s in pairs), device))


class Steps:
    """A clock that is read after each step, when the device has done it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.last = device, [], 0.0

    def start(self) -> None:
        self.last = self._now()

    def next(self) -> None:
        now = self._now()
        self.seconds.append(now - self.last)
        self.last = now

    def _now(self) -> float:
        if common.is_gpu(self.device):
            torch.cuda.synchronize()
        return time.perf_counter()


class Memory:
    """The most bytes that were held since it was made, beyond those that were held then; None on CPUs."""

    def __init__(self, device: torch.device) -> None:
        self.counts = common.is_gpu(device)
        gc.collect()
        if self.counts:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()

    def peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.before if self.counts else None


def by_hand(bench: Bench, trainer: Any, cp: df.ContextParallel) -> Made:
    """A loop as `hand_loop` has it, on the trainer's sequences."""
    steps, memory = Steps(bench.device), Memory(bench.device)
    inner = bench.model()
    checkpoint_layers(inner, df.keep_attention)
    model = CausalLM(inner.train(), LOSS_CHUNK)
    shard_model(model, dist.device_mesh.init_device_mesh(bench.device.type, (cp.world_size,)), bench.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=bench.lr, weight_decay=0.0)
    loader = DataLoader(trainer.train_dataset, 1, collate_fn=trainer.data_collator)
    made = Made()
    steps.start()
    for _, batch in zip(range(bench.steps), loader, strict=False):
        inputs = dft.shard_batch({name: x.to(bench.device) for name, x in only_known(batch)}, cp)
        labels = inputs.pop("shift_labels")
        inputs = {name: x for name, x in inputs.items() if name not in ("labels", "num_items_in_batch")}
        loss = cp.mean(model(inputs, labels), (labels != -100).sum(), reduction="mean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        made.losses.append(loss.item())
        made.tokens.append(batch["input_ids"].numel())
        steps.next()
    made.seconds, made.peak = steps.seconds, memory.peak()
    return made


def only_known(batch: Any) -> Iterator[tuple[str, Any]]:
    return ((name, x) for name, x in batch.items() if isinstance(x, torch.Tensor))


def by_trainer(trainer: Any, device: torch.device, memory: Memory) -> Made:
    """memory: from before the trainer was made."""
    steps = Steps(device)

    class Timed(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            steps.start()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            steps.next()

    trainer.add_callback(Timed())
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    seen = [0, *(int(entry["num_tokens"]) for entry in logged)]
    tokens = [after - before for before, after in pairwise(seen)]
    return Made([entry["loss"] for entry in logged], steps.seconds, tokens, memory.peak())


def make_trainer(bench: Bench, cp: df.ContextParallel, model: nn.Module) -> Any:
    from trl import SFTConfig

    names = {each.name for each in fields(SFTConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    on_gpu = common.is_gpu(bench.device)
    given: dict[str, Any] = dict(
        use_cpu=not on_gpu,
        bf16=on_gpu,
        packing=True,
        max_length=bench.seq_len,
        per_device_train_batch_size=1,
        train_sampling_strategy="sequential",
        max_steps=bench.steps,
        learning_rate=bench.lr,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        max_grad_norm=CLIP,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    given[checkpointing] = True
    kind: Any = dft.SFTTrainer
    if on_gpu:
        given |= dict(fsdp=True, fsdp_config={"version": 2, "transformer_layer_cls_to_wrap": [bench.layer]})
    else:
        from tests.trainer_runs import fully_sharded

        kind = fully_sharded(kind, bench.layer)
    args = SFTConfig(tempfile.mkdtemp(), **given)
    return kind(model, args, context_parallel=cp, train_dataset=bench.documents(), processing_class=any_tokenizer())


def any_tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one, also for documents that are tokens already."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"pad": 0, "end": 1, "unknown": 2}, unk_token="unknown"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="pad", eos_token="end")


def measure(bench: Bench, cp: df.ContextParallel) -> dict[str, Any]:
    """Both in turn. Of a hybrid only the trainer, with the share of the gathered layers in its time."""
    memory = Memory(bench.device)
    model = bench.model()
    share = None
    if bench.hybrid:
        names = dft.gather_layers(model, cp).names
        share = LayerShare([model.get_submodule(name) for name in names], bench.device)
    parameters = sum(p.numel() for p in model.parameters())
    trainer = make_trainer(bench, cp, model)
    ways = {TRAINER: by_trainer(trainer, bench.device, memory)}
    row: dict[str, Any] = {"parameters": parameters, "kernel": repr(cp.kernel)}
    if share is not None:
        row["gathered layers"] = {"count": len(share.layers), "share of time": share.of(sum(ways[TRAINER].seconds))}
        row["fast path"] = common.installed("fla-core", "causal-conv1d")
    else:
        del model
        let_go(trainer)
        ways[BY_HAND] = by_hand(bench, trainer, cp)
    return row | {
        "tokens per second": {way: made.rate(bench.device) for way, made in ways.items()},
        "peak bytes": {way: peak_of(made, bench.device) for way, made in ways.items()},
        "losses": {way: made.losses for way, made in ways.items()},
        "seconds": {way: made.seconds for way, made in ways.items()},
        "tokens": {way: made.tokens for way, made in ways.items()},
    }


def let_go(trainer: Any) -> None:
    """Free the trainer's weights and optimizer, and keep its sequences."""
    trainer.accelerator.free_memory()
    trainer.model = trainer.model_wrapped = trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.model = trainer.callback_handler.optimizer = trainer.callback_handler.lr_scheduler = None


def peak_of(made: Made, device: torch.device) -> float | None:
    return None if made.peak is None else common.worst(common.over_ranks(made.peak, device))


def problems(row: dict[str, Any], dtype: torch.dtype) -> list[str]:
    """What may not be."""
    found = []
    losses = row["losses"]
    if BY_HAND in losses:
        apart = max(abs(a / b - 1) for a, b in zip(losses[TRAINER], losses[BY_HAND], strict=True))
        if not apart <= ALIKE[dtype]:
            found.append(f"losses differ by {apart:.1e}: {losses}")
        if row["tokens"][TRAINER] != row["tokens"][BY_HAND]:
            found.append(f"other sequences: {row['tokens']}")
    if not all(map(math.isfinite, losses[TRAINER])):
        found.append(f"losses are not finite: {losses}")
    return found


def report(row: dict[str, Any]) -> None:
    common.say(f"\n{row['parameters'] / 1e9:.2f} B parameters, {row['tokens'][TRAINER][-1]} tokens a step")
    for way, rate in row["tokens per second"].items():
        peak = row["peak bytes"][way]
        memory = "" if peak is None else f"   peak {peak / 2**30:6.2f} GiB"
        common.say(f"  {way:16} {rate:12,.0f} tokens/s{memory}   loss {row['losses'][way][-1]:.4f}")
    if "gathered layers" in row:
        common.say(f"  gathered layers: {row['gathered layers']}")


def parse() -> argparse.Namespace:
    parser = common.arguments(__doc__.splitlines()[0])
    parser.add_argument("--hybrid", action="store_true", help="a hybrid of about 1B parameters instead of a Llama")
    parser.add_argument("--tiny", action="store_true", help="models and sequences for CPUs")
    parser.add_argument("--seq-len", type=int, help="by default 128K, of hybrids 64K, of tiny ones 512")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--lr", type=float, default=1e-4)
    return parser.parse_args()


def main() -> int:
    options = parse()
    device = common.start(options.device)
    seq_len = options.seq_len or (512 if options.tiny else 65536 if options.hybrid else 131072)
    bench = Bench(device, seq_len, options.steps, options.hybrid, options.tiny, options.lr)
    cp = df.ContextParallel(dist.group.WORLD)
    dft.register(cp)
    row = measure(bench, cp)
    found = problems(row, bench.dtype)
    report(row)
    versions = common.installed("transformers", "trl", "accelerate")
    name = f"sft-{'hybrid' if bench.hybrid else 'llama'}{'-tiny' if bench.tiny else ''}-{cp.world_size}"
    common.save(name, options.out, {"seq_len": seq_len, "versions": versions, **row, "problems": found})
    for problem in found:
        common.say(f"wrong: {problem}")
    dft.unregister()
    common.finish()
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
