"""The main job on two GPUs, with lengths at which tensors end at page boundaries: a regression test."""

import pytest
import torch

from tests.jobs import finish, start, torchrun

SHAPES = {
    "head dim 64": ["--dim", 512, "--heads", 8, "--kv-heads", 2],
    "head dim 128": ["--dim", 1024, "--heads", 8, "--kv-heads", 2],
    "head dim 256": ["--dim", 1024, "--heads", 4, "--kv-heads", 1],
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.timeout(3600)
def test_the_main_job_runs_again_and_again(shape, tmp_path, request):
    """Twice; twenty times with --full."""
    for n in range(20 if request.config.getoption("--full") else 2):
        options = ["--seq-len", 32768, "--batch-size", 1, "--layers", 4, "--steps", 3, "--verify", *SHAPES[shape]]
        job = start(*torchrun(2), "launch/train.py", *options, "--out", tmp_path / str(n))
        finish(job, timeout=170)
