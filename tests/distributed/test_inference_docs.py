"""The examples of docs/inference.md as one job: each runs, with the results of one device."""

import re

import pytest

from tests import forked
from tests.jobs import ROOT

TEXT = (ROOT / "docs" / "inference.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
# Of the examples' numbers, those that would take long on a CPU, and a dtype in which results can be compared.
SMALL = {
    "8192": "16",
    "131072": "128",
    "torch.bfloat16": "torch.float64",
    "kv_heads=8, d_qk=128": "kv_heads=2, d_qk=16",
}

PRELUDE = """
import torch, torch.distributed as dist, distflash as df
dist.init_process_group("gloo")
torch.manual_seed(0)  # the same on every rank
prompt_len, chunk_len = 41, 16
def drawn(batch, tokens):
    return [torch.randn(batch, tokens, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
def require_equal(out, *tokens):
    whole = [torch.cat(parts, 1) for parts in zip(*tokens, strict=True)]
    torch.testing.assert_close(out, df.attention(*whole, mask=df.Causal())[:, -out.shape[1] :])
q, k, v = prompt = drawn(1, prompt_len)
q_new, k_new, v_new = new = drawn(1, 1)
x, x_new = torch.randn(1, prompt_len, 256), torch.randn(1, 1, 256)
"""
# By a word of an example: what it needs, and what has to hold afterwards.
AROUND = {
    "df.ContextParallel(": ("", "require_equal(out, prompt, new)"),
    "chunk_len": ("", "assert positions[0] >= 42 and position == 42"),
    "df.nn.SelfAttention": (
        "",
        "alone = df.nn.SelfAttention(dim=256, heads=8, kv_heads=2); alone.load_state_dict(layer.state_dict())\n"
        "whole = alone(torch.cat((x, x_new), 1), mask=df.Causal()).detach()\n"
        "torch.testing.assert_close(torch.cat((cp.unshard(y), y_new), 1), whole)",
    ),
    "prompts": (
        "prompts = [drawn(1, 7), drawn(1, 12)]\nq_new, k_new, v_new = drawn(2, 1)",
        "for n, some in enumerate(prompts): require_equal(out[n : n + 1], some, [y[n : n + 1] for y in (q_new, k_new, "
        "v_new)])",
    ),
    "multinomial": (
        "torch.manual_seed(cp.rank); logits = torch.randn(1, 97)",
        "tokens = [torch.empty_like(token) for _ in range(cp.world_size)]; dist.all_gather(tokens, token)\n"
        "assert all(one.equal(token) for one in tokens)",
    ),
    "ShardedCache": (
        "from copy import deepcopy\nfrom transformers import AutoModelForCausalLM, LlamaConfig\ntorch.manual_seed(0)\n"
        "config = LlamaConfig(vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, "
        "num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)\nids = torch.randint(3, 97, (1, 70))",
        "eager = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation='eager')\n"
        "eager.load_state_dict(model.state_dict())\nassert tokens.equal(eager.generate(ids, max_new_tokens=32))",
    ),
}


def _job() -> str:
    parts = [PRELUDE]
    for block in BLOCKS:
        word = next((word for word in AROUND if word in block), None)
        if word is not None:
            before, after = AROUND[word]
            for large, small in SMALL.items():
                block = block.replace(large, small)
            parts += [before, block, after]
    return "\n".join([*parts, 'print("equal", flush=True)', "dist.destroy_process_group()"])


@pytest.mark.timeout(300)
def test_the_examples_run_on_two_ranks(tmp_path):
    script = tmp_path / "examples.py"
    script.write_text(_job())
    assert forked.finish(2, script, timeout=250).count("equal") == 2


def test_every_example_is_run_but_that_of_cuda_graphs():
    left_out = [block for block in BLOCKS if not any(word in block for word in AROUND)]
    assert len(BLOCKS) == len(AROUND) + 1
    assert [re.search(r"torch\.cuda\.graph", block) is not None for block in left_out] == [True]
    compile(left_out[0], "docs/inference.md", "exec")
