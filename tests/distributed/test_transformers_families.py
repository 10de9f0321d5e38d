"""Model types over two real ranks, as in docs/transformers.md; the fast ones."""

import re
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import distflash as df
from tests.jobs import finish, start

PRELOAD = "tools.families"
PAGE = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"
SOME = [
    ("llama", "LlamaForCausalLM", "causal"),
    ("qwen2_moe", "Qwen2MoeForCausalLM", "causal"),
    ("diffllama", "DiffLlamaForCausalLM", "causal"),
    ("opt", "OPTForCausalLM", "causal"),
    ("llama4_text", "Llama4ForCausalLM", "causal"),
    ("bert", "BertForMaskedLM", "masked"),
    ("roberta", "RobertaForMaskedLM", "masked"),
    ("deberta-v2", "DebertaV2ForMaskedLM", "masked"),
    ("gptj", "GPTJForCausalLM", "causal"),
    ("mamba2", "Mamba2ForCausalLM", "causal"),
    ("bart", "BartForCausalLM", "causal"),
]


def rows():
    """The table's results by class."""
    table = re.search("<!-- families: begin -->(.*)<!-- families: end -->", PAGE.read_text(), re.DOTALL)[1]
    return {cls: result for _, cls, result in re.findall(r"^\| (\S+) \| `(\w+)` \| (.*) \|$", table, re.MULTILINE)}


def outcomes_on_rank(chosen):
    """Runs as a rank."""
    from tools.families import Family, outcome

    return [outcome(Family(*family), df.ContextParallel(dist.group.WORLD)) for family in chosen]


@pytest.mark.timeout(300)
def test_some_families_are_what_the_table_says(ranks_of):
    by_rank = ranks_of(2).run(outcomes_on_rank, SOME)
    assert by_rank[0] == by_rank[1]
    for (_, cls, _), result in zip(SOME, by_rank[0], strict=True):
        expected = rows()[cls]
        if expected.startswith("equal"):
            assert result.startswith("equal ("), f"{cls}: {result}"
        else:
            assert " ".join(result.split()) == expected


def test_the_table_has_nothing_but_equal_and_refused_families():
    table = rows()
    assert len(table) > 150
    assert all(re.match(r"equal \(\d|refused: \w+: ", result) for result in table.values())
    assert sum(result.startswith("equal") for result in table.values()) > 90


def test_the_table_lists_the_installed_librarys_families():
    import transformers

    from tools.families import families
    from tools.transformers_families import published

    page = PAGE.read_text()
    listed, installed = published(page).keys(), {(f.model_type, f.class_name, f.head) for f in families()}
    if f"transformers {transformers.__version__} and torch" in page:
        assert listed == installed
    else:  # another version has a few families more, or less
        assert len(listed & installed) > 0.8 * len(listed)


def test_a_row_is_written_by_itself_and_no_other_changes():
    from tools.families import Family, families
    from tools.transformers_families import published, with_table

    page = with_table(PAGE.read_text(), [(family, "equal (0)") for family in families()], 2)
    chosen = Family("llama", "LlamaForCausalLM", "causal")
    changed = published(with_table(page, [(chosen, "refused: a | b")], 2))
    key = ("llama", "LlamaForCausalLM", "causal")
    assert changed.pop(key) == r"refused: a \| b"
    before = published(page)
    assert before.pop(key).startswith("equal") and changed == before


def longrope_on_rank(seq_len, layout, after_another=False):
    """Runs as a rank: the logits of a model with longrope whose limit is 20 tokens, or the error's text."""
    from distflash.integrations import transformers as tf
    from tests.tiny_models import Case

    cp = df.ContextParallel(dist.group.WORLD, layout)
    tf.register(cp)
    try:
        ids = torch.arange(seq_len)[None] % 40
        part = tf.shard_batch({"input_ids": ids}, cp)
        if after_another:
            Case("llama").model("distflash")(**part)
        return cp.unshard(longrope("distflash")(**part).logits).detach()
    except ValueError as error:
        return str(error)
    finally:
        tf.unregister()


def longrope(attention):
    from transformers import AutoModelForCausalLM, Phi3Config

    from tests.tiny_models import SMALL

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = Phi3Config(
        **{name: size for name, size in SMALL.items() if name != "head_dim"},
        max_position_embeddings=80,
        original_max_position_embeddings=20,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 20,
            **factors,
        },
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


@pytest.mark.parametrize(
    ("seq_len", "layout"),
    [(20, df.Zigzag()), (24, df.Zigzag()), (40, df.Zigzag()), (24, df.Contiguous()), (22, df.Striped())],
    ids=repr,
)
def test_longrope_is_eagers_or_refused(seq_len, layout, ranks_of):
    from tests.tiny_models import relative

    got = ranks_of(2).run(longrope_on_rank, seq_len, layout)
    if seq_len == 24:
        assert all(text.startswith("rope_type: 'longrope' has other frequencies up to 20 tokens") for text in got)
    else:
        expected = longrope("eager")(input_ids=torch.arange(seq_len)[None] % 40).logits.detach()
        assert all(relative(logits, expected) <= 1e-5 for logits in got)


def test_longrope_is_refused_in_the_second_model_of_a_batch_too(ranks_of):
    got = ranks_of(2).run(longrope_on_rank, 24, df.Zigzag(), True)
    assert all(text.startswith("rope_type: 'longrope' has other frequencies up to 20 tokens") for text in got)


def one_rank_with_eager(eager_rank):
    """Runs as a rank: what a call says of which one rank's model has another attention."""
    from distflash.integrations import transformers as tf
    from tests.tiny_models import Case

    cp = df.ContextParallel(dist.group.WORLD)
    tf.register(cp)
    try:
        model = Case("llama").model("eager" if cp.rank == eager_rank else "distflash")
        with pytest.raises(ValueError) as error:
            model(**tf.shard_batch({"input_ids": Case("llama").inputs()["input_ids"]}, cp))
        return str(error.value)
    finally:
        tf.unregister()


def test_a_rank_that_has_not_attended_stops_all(ranks_of):
    texts = ranks_of(2).run(one_rank_with_eager, 1)
    assert "no layer of the model has used distflash" in texts[1] and "rank 1 refused this call" in texts[0], texts


def test_the_script_prints_families():
    output = finish(start(sys.executable, "-m", "tools.transformers_families", "llama", "gptj"), timeout=250)
    assert re.search(r"llama \| LlamaForCausalLM \| equal \(\d", output)
    assert "gptj | GPTJForCausalLM | refused: model: the attention of GPTJForCausalLM" in output
