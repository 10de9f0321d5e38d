"""The example with Lightning, as a rank."""

import importlib.util
import io
import os
import re
from contextlib import redirect_stdout

import lightning  # noqa: F401
import torch.distributed as dist

from tests.jobs import ROOT


def train(context: int) -> list[float]:
    """The losses that the example prints, on the first rank only; two micro-batches a step."""
    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests"}
    os.environ |= {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "localhost", "MASTER_PORT": "29512"}
    spec = importlib.util.spec_from_file_location("example", ROOT / "examples" / "lightning_module.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    with redirect_stdout(io.StringIO()) as printed:
        example.train(context, steps=3)
    return [float(loss) for loss in re.findall(r"^step \d+: loss (\S+)$", printed.getvalue(), re.MULTILINE)]
