"""Is the sharded step exact? Replay its batch unsharded on one rank, and compare the loss and every gradient.

How far may two exact computations be apart? As far as rounding moves either of them, which depends on the weights, the
depth and the compute type, and is measured rather than guessed: the unsharded replay is made once more with every
weight moved by one unit in the last place, up or down at random. What that changes is what rounding changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from rich.table import Table
from torch import Tensor, nn

from launch.fsdp import ShardedGradients, whole
from launch.model import Decoder
from launch.optimizer import Gradients
from launch.step import Step

# One nudged replay is one sample of what rounding does, and its size counts as a standard deviation: four leave room
# for chance. In float32 rounding comes to 1e-6; a hop that is dropped or counted twice is off by 1e-1, and the last 2%
# of the queries without the first 2% of the keys by 5e-4.
SIGMAS = 4


@dataclass(frozen=True)
class Difference:
    """Between the sharded and the unsharded value of one tensor.

    largest: of any element. relative: the norm of the difference by the norm of the unsharded tensor.
    """

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Verdict:
    """The differences of all tensors, and the relative one that rounding explains."""

    differences: tuple[Difference, ...]
    tolerance: float

    @property
    def worst(self) -> Difference:
        return max(self.differences, key=lambda difference: difference.relative)

    @property
    def passed(self) -> bool:
        return all(difference.relative <= self.tolerance for difference in self.differences)  # False for NaN

    def summary(self) -> str:
        worst, outcome = self.worst, "verified" if self.passed else "NOT VERIFIED"
        return (
            f"{outcome}: sharded and unsharded differ by at most {worst.relative:.1e} of the norm ({worst.name}); "
            f"rounding explains {self.tolerance:.1e}"
        )

    def table(self) -> Table:
        table = Table(title="First batch: sharded against unsharded on one rank")
        table.add_column("loss or gradient of")
        table.add_column("largest difference", justify="right")
        table.add_column("relative to its norm", justify="right")
        for difference in self.differences:
            table.add_row(difference.name, f"{difference.largest:.2e}", f"{difference.relative:.2e}")
        return table


def verify(sharded: Step, model: Decoder, gradients: Gradients | ShardedGradients, step: int) -> Verdict:
    """Compare `step` with its unsharded replay by the first rank. All ranks call, and all get the verdict."""
    gradients.zero()
    mine = {"loss": sharded(model, step)}
    gradients.combine()
    # All ranks take part in putting together what FSDP has sharded.
    weights = {name: whole(p.detach()) for name, p in model.named_parameters()}
    mine.update({name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None})
    box: list[Verdict | None] = [None]
    if dist.get_rank() == 0:
        twin = Decoder(sharded.config.model, cp=None).to(sharded.device)
        twin.load_state_dict(weights)
        alone = replace(sharded, cp=None, share=(0, 1))
        exact = {"loss": alone(twin, step), **take_gradients(twin)}
        nudge(twin, torch.finfo(sharded.config.compute_dtype).eps)
        nudged = {"loss": alone(twin, step), **take_gradients(twin)}
        box = [judge(mine, exact, nudged)]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def judge(sharded: Mapping[str, Tensor], unsharded: Mapping[str, Tensor], nudged: Mapping[str, Tensor]) -> Verdict:
    """The verdict over the loss and gradients by name; `nudged` are those of the weights moved by one unit."""
    differences = tuple(compare(name, sharded[name], unsharded[name]) for name in unsharded)
    rounding = max(compare(name, nudged[name], unsharded[name]).relative for name in unsharded)
    return Verdict(differences, SIGMAS * rounding)


def compare(name: str, value: Tensor, reference: Tensor) -> Difference:
    delta = (value - reference).double()
    norm = reference.double().norm()
    relative = delta.norm() / norm if norm > 0 else delta.norm()
    return Difference(name, delta.abs().max().item(), relative.item())


def take_gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients by name; the model is left without."""
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return taken


@torch.no_grad()
def nudge(model: nn.Module, eps: float) -> None:
    """Multiply every weight by 1 + eps or 1 - eps, the same ones at every call."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator).mul_(2).sub_(1)
        parameter.mul_(1 + eps * signs.to(parameter))
