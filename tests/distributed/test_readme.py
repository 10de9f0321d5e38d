"""The README's diff: the changed model has the gradients of the original."""

import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import distflash as df
from tests.documents import ROOT

DIFF = re.search(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
VOCABULARY, DIM, HEADS, KV_HEADS, HEAD_DIM = 31, 24, 6, 2, 8
# Sums in another order, in float64: a few rounding units of the whole (at most 4 were seen).
UNITS = 16 * torch.finfo(torch.float64).eps
TOKENS, SEQUENCES = 45, 4  # 44 after the shift: 11 for each of four ranks, and unequal ones for three


def side(sign: str) -> str:
    """The code without the diff's other side."""
    return "\n".join(line[1:] for line in DIFF.splitlines() if line[:1] in (" ", sign, ""))


def flash_attn_func(q, k, v, causal):
    """What the diff starts from, dense."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)


def parts_of(attention: type[nn.Module]) -> type[nn.Module]:
    """The model around the README's attention, with the parts that its own __init__ would have made."""

    class Llama(nn.Module):
        def __init__(self, cp=None):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(VOCABULARY, DIM), nn.Linear(DIM, VOCABULARY)
            self.layers = nn.ModuleList(attention() for _ in range(2))
            for layer in self.layers:
                layer.project, layer.out = nn.Linear(DIM, 10 * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, DIM)
                layer.cp = cp
                layer.rope = df.nn.RotaryEmbedding(HEAD_DIM)
                layer.qkv = lambda x, to=layer.project: to(x).unflatten(-1, (10, HEAD_DIM)).split((6, 2, 2), dim=2)

        def forward(self, tokens, S):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = x + layer(x, S)
            return self.head(x)

    return Llama


def sharded(model: nn.Module) -> nn.Module:
    """FSDP2 over all ranks."""
    for part in (*model.layers, model):
        fully_shard(part, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


WRAPS = {"ddp": nn.parallel.DistributedDataParallel, "fsdp2": sharded}


def train(sign: str, wrap: str, data: int, context: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One side's one step in float64, as this rank: its loss, and its whole gradients by name."""
    torch.set_default_dtype(torch.float64)
    dataset = torch.randint(0, VOCABULARY, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    kept = {}
    names = {"torch": torch, "dist": dist, "nn": nn, "F": F, "flash_attn_func": flash_attn_func, "device": "cpu"}
    names |= {"DataLoader": DataLoader, "DistributedSampler": DistributedSampler, "init_device_mesh": init_device_mesh}
    names |= {"data": data, "context": context, "dataset": dataset, "batch_size": SEQUENCES // data}

    def wrapped(model: nn.Module) -> nn.Module:
        kept["model"] = WRAPS[wrap](model)
        return kept["model"]

    before, start, after = side(sign).partition("dist.init_process_group(backend)")
    assert start, "the README begins its training loop otherwise"
    try:
        exec(before, names)
        names |= {"Llama": parts_of(names["Attention"]), "wrap": wrapped}
        exec(after, names)
    finally:
        torch.set_default_dtype(torch.float32)
    gradients = {name: parameter.grad for name, parameter in kept["model"].named_parameters()}
    full = {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in gradients.items()}
    return names["loss"].detach(), {name.removeprefix("module."): g for name, g in full.items()}


def test_each_side_is_python():
    for sign in "-+":
        compile(side(sign), "README.md", "exec")
    added = [line for line in DIFF.splitlines() if line.startswith("+") and not line[1:].lstrip().startswith("#")]
    assert len(added) == 11  # as the README says


@pytest.mark.timeout(300)
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize(
    ("data", "context"), [(1, 2), (2, 2), (1, 3)], ids=["context 2", "data 2 x context 2", "context 3"]
)
def test_the_diff_trains_as_one_process_does(data, context, wrap, ranks_of):
    loss, gradients = ranks_of(1).run(train, "-", "ddp", 1, 1)[0]
    for got_loss, got in ranks_of(data * context).run(train, "+", wrap, data, context):
        assert abs(got_loss - loss) <= UNITS * loss.abs()
        for name, expected in gradients.items():
            assert (got[name] - expected).norm() <= UNITS * expected.norm(), name


def test_lines_of_code_fit_a_narrow_page():
    blocks = re.findall(r"```(?:diff|python)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) > 2 and all(len(line) <= 88 for block in blocks for line in block.splitlines())
