"""Is the sharded step exact? Replay one batch unsharded, and compare the loss, outputs and all gradients.

Two exact computations differ by rounding. How much depends on the weights, the depth and the dtypes, so it is measured:
the unsharded replay is repeated with every weight changed by one unit in the last place, up or down at random. The
change of the results bounds the difference that rounding may cause.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from distflash import groups
from distflash.comparison import Comparison, judge
from distflash.context import ContextParallel
from distflash.differences import Report
from distflash.rank_texts import RankTexts
from distflash.recording import Recorder, Run, nudge, tensors_in
from distflash.transport import Alone, Transport

Step = Callable[[Any, ContextParallel | None], Any]

NUDGES = 2  # nudged replays: the change of a scalar in a single one may be small by chance


def verify(
    step: Step,
    batch: Any,
    cp: ContextParallel,
    *,
    model: nn.Module | None = None,
    reduction: Literal["sum", "mean"] | None = None,
    group: dist.ProcessGroup | DeviceMesh | Transport | None = None,
    quiet: bool = False,
) -> Report:
    """Compare one sharded step with its unsharded replay. All ranks of the group must call it.

    ``step(batch, cp)`` runs sharded once. Then every rank runs ``step(batch, None)`` on the whole batch, so it works
    with DDP, FSDP and ZeRO, whose forward and backward are collective.

    Args:
        step: ``step(batch, cp)`` returns the loss of the whole batch, a scalar, the same on every rank. With a group it
            shards the batch (`ContextParallel.shard`). With None it computes the same on the whole batch, without
            communication of its own. It may call ``backward``; otherwise verify does. It must not clip gradients
            (clipping hides wrong factors) or change weights. It may return a tuple: the loss, further tensors to
            compare, and a mapping of names to full gradients, if parameters do not hold them (DeepSpeed).
        batch: the whole batch, the same on every rank.
        cp: the group that holds the sequence. Modules that hold it in an attribute, as `distflash.nn.SelfAttention`
            does, have a group of this one process there during the replay.
        model: the module whose parameters, layers and output are compared; by default those that step calls.
        reduction: how gradients are combined over the ranks after step returns: "sum" or "mean". None if step, DDP,
            FSDP or ZeRO has combined them; then gradients that differ between ranks are added, and the report says so.
        group: with data parallelism all ranks of data x context, as in `ContextParallel.mean`; by default those of cp.
        quiet: print nothing. Otherwise the first rank prints the report.

    Returns:
        The report, the same on every rank. A difference does not raise: see `Report.ok` and `Report.require`.

    Raises:
        ValueError: on every rank: an argument has the wrong type, or step does not return what it should.
        RuntimeError: another rank raised; the message has its error. That rank raises its own error.

    Examples:
        >>> cp = df.ContextParallel(dist.group.WORLD)
        >>> layer = df.nn.SelfAttention(64, heads=4, cp=cp)
        >>> for weight in layer.parameters():
        ...     dist.broadcast(weight.data, 0)
        >>> def step(batch, cp):
        ...     x = batch if cp is None else cp.shard(batch)
        ...     total = layer(x, seq_len=batch.shape[1]).square().sum()
        ...     return total / batch.numel() if cp is None else cp.mean(total, x.numel(), reduction="sum")
        >>> report = df.verify(step, torch.ones(1, 20, 64), cp, reduction="sum", quiet=True)
        >>> report.ok
        True
    """
    _require_arguments(step, cp, model, reduction)
    ranks = cp.transport if group is None else groups.wider_transport(group, cp.transport)
    texts = RankTexts(ranks, "distflash.verify", release=lambda words: cp.refuse(words, in_attention=True))
    replays = _Replays(step, batch, cp, model, reduction, texts)
    with texts.sharing_errors(), _every_call_compared(cp):
        report = replays.report(layers=False)
        if not report.ok:  # again with the layers, to find where the difference starts; recording them takes memory
            report = replays.report(layers=True)
    if not quiet and ranks.rank == 0:
        print(report)
    return report


@dataclass(frozen=True)
class _Replays:
    """The runs of one batch."""

    step: Step
    batch: Any
    cp: ContextParallel
    model: nn.Module | None
    reduction: str | None
    texts: RankTexts

    def report(self, layers: bool) -> Report:
        """Compare all runs. The same on every rank."""
        comparison = Comparison(self.cp, self.texts.transport, self.reduction, *self.all(layers))
        return judge(comparison.tables(), comparison.notes)

    def all(self, layers: bool) -> tuple[Run, Run, list[Run]]:
        """The sharded run, the unsharded one, and unsharded ones whose weights are nudged."""
        sharded = self._run(self.cp, layers)
        with _alone(sharded.roots, self.cp):
            calls = _calls(self.cp)
            unsharded = self._run(None, layers)
            if _calls(self.cp) != calls:
                raise ValueError(
                    "step: the replay, step(batch, None), attended over the group; use the group that step is given, "
                    "and keep it in attributes of modules if anywhere, where the replay finds and removes it"
                )
            nudged = [self._nudged(unsharded, layers, seed) for seed in range(NUDGES)]
        return sharded, unsharded, nudged

    def _nudged(self, unsharded: Run, layers: bool, seed: int) -> Run:
        undo = nudge(unsharded.roots, unsharded.eps, seed)
        try:
            return self._run(None, layers)
        finally:
            undo()

    def _run(self, cp: ContextParallel | None, layers: bool) -> Run:
        """One run, from the same state of the random number generators."""
        inputs = {f"batch[{n}]": x for n, x in enumerate(tensors_in(self.batch)) if x.is_leaf and x.requires_grad}
        gpus = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(gpus), Recorder(self.model, layers, inputs) as recorder:
            loss, returned, gradients = _parts(self.step(self.batch, cp))
            done = self.texts.exchange(str(int(gradients is not None or recorder.has_gradients())))
            if "1" not in done and loss.requires_grad:
                loss.backward()
            recorder.require_same_weights()
            return recorder.run(loss, returned, gradients)


def _parts(result: Any) -> tuple[Tensor, list[Tensor], Mapping[str, Tensor] | None]:
    """The loss, further tensors and gradients that step returned."""
    loss, *others = result if isinstance(result, tuple | list) and result else (result,)
    if isinstance(loss, int | float):
        loss = torch.tensor(float(loss))  # float32, the usual dtype of losses
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(loss)
        raise ValueError(f"step: expected it to return the loss, a scalar, first; got {what}")
    gradients = next((x for x in others if isinstance(x, Mapping)), None)
    return loss, tensors_in([x for x in others if not isinstance(x, Mapping)]), gradients


def _calls(cp: ContextParallel) -> int:
    """How many calls of attention the ranks of ``cp`` have made so far."""
    return cp.agreement.calls


@contextmanager
def _alone(roots: Sequence[nn.Module], cp: ContextParallel) -> Iterator[None]:
    """Within it, modules with ``cp`` in an attribute have a group of one rank there, for the whole sequence."""
    alone = ContextParallel(Alone(device=cp.transport.device))
    holders = [
        (module, name) for root in roots for module in root.modules() for name, x in vars(module).items() if x is cp
    ]
    try:
        for module, name in holders:
            setattr(module, name, alone)
        yield
    finally:
        for module, name in holders:
            setattr(module, name, cp)


@contextmanager
def _every_call_compared(cp: ContextParallel) -> Iterator[None]:
    """Within it, ranks compare every call of attention, not only those with a new signature."""
    before = cp.check_every_call
    try:
        cp.check_every_call = True
        yield
    finally:
        cp.check_every_call = before


def _require_arguments(step: object, cp: object, model: object, reduction: object) -> None:
    if not callable(step):
        raise ValueError(f"step: expected a function step(batch, cp) that returns the loss, got {step!r}")
    if not isinstance(cp, ContextParallel):
        raise ValueError(f"cp: expected a ContextParallel, got {cp!r}; the unsharded replay is made by verify itself")
    if model is not None and not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module or None, got {model!r}")
    if reduction not in (None, "sum", "mean"):
        raise ValueError(
            f"reduction: expected 'sum', 'mean' or None, got {reduction!r}; 'sum' or 'mean' where gradients are "
            "combined after step returns, None where they are combined by then (DDP, FSDP, ZeRO)"
        )
