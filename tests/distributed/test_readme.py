"""The ten lines of the README, as a job: they run, and their gradients are those of one process."""

import re

import pytest

from tests.jobs import ROOT, finish, start, torchrun

TEN_LINES = re.search(r"```python\n(import torch, .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
# The same on one device, and how far the gradients are from it.
CHECK = """
torch.manual_seed(0)
alone, tokens = torch.nn.Linear(64, 12 * 64), torch.randn(1, S, 64)
exact = torch.nn.Linear(64, 12 * 64, dtype=torch.float64)
exact.load_state_dict(alone.state_dict())
for one in (alone, exact):
    parts = one(tokens.to(one.weight.dtype)).unflatten(-1, (12, 64)).split((8, 2, 2), dim=2)
    whole = df.attention(*parts, mask=df.Causal() & df.Window(1023)).square().mean()
    whole.backward()
for mine, single, truth in zip(model.parameters(), alone.parameters(), exact.parameters(), strict=True):
    # Twice what float32 makes of it on one device: sums in another order; and a rounding unit.
    error, bar = ((p.grad - truth.grad).norm() for p in (mine, single))
    assert error <= 2 * bar + torch.finfo(torch.float32).eps * truth.grad.norm(), (error, bar)
torch.testing.assert_close(loss, whole.to(loss.dtype))
print("equal")
dist.destroy_process_group()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_ten_lines_train_as_one_process_does(ranks, tmp_path):
    script = tmp_path / "ten_lines.py"
    script.write_text(TEN_LINES + CHECK)
    output = finish(start(*torchrun(ranks), script), timeout=110)
    assert output.count("equal") == ranks
    assert len(re.findall(r"rank \d holds \d+ of 4099 tokens, from \d+ on; loss \d", output)) == ranks
