"""The ten lines of the README, as a job: they run, and their gradients are those of one process."""

import re

import pytest

from tests.jobs import ROOT, finish, start, torchrun

TEN_LINES = re.search(r"```python\n(import torch, .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
# The same on one device, and how far the gradients are from it.
CHECK = """
torch.manual_seed(0)
alone = torch.nn.Linear(64, 12 * 64)
parts = alone(torch.randn(1, S, 64)).unflatten(-1, (12, 64)).split((8, 2, 2), dim=2)
whole = df.attention(*parts, mask=df.Causal() & df.Window(1023)).square().mean()
whole.backward()
for mine, expected in zip(model.parameters(), alone.parameters(), strict=True):
    torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-4, atol=1e-4 * expected.grad.abs().max())
torch.testing.assert_close(loss, whole)
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
