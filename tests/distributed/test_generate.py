"""Generation from a checkpoint of two ranks, on any number of ranks, against the model without a cache."""

import re
import shutil
import signal
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from distflash.recipes import generator
from distflash.recipes.data import SEPARATOR
from distflash.recipes.inference_config import GenerateConfig
from tests import jobs
from tests.damage import flip
from tests.jobs import finish, torchrun
from tests.trained_run import TEXT, Ended, as_rank, load_alone

pytestmark = pytest.mark.timeout(300)

PROMPT = TEXT[:100]  # chunks of 50 bytes do not divide it
NEW = 50
GREEDY = GenerateConfig(prompt=PROMPT, max_new_tokens=NEW, temperature=0.0, chunk=50, device="cpu")


def generate(config: GenerateConfig) -> Ended:
    """Runs as a rank."""
    return as_rank(generator.generate, config)


def generate_with_a_seed_a_rank(config: GenerateConfig) -> Ended:
    return generate(replace(config, seed=dist.get_rank()))


@cache
@torch.no_grad()
def without_a_cache(run: Path) -> str:
    """The likeliest text, for each byte of which the whole sequence is computed anew on one device."""
    model, tokens = load_alone(run), list(PROMPT.encode())
    for _ in range(NEW):
        likeliest = int(model(torch.tensor([tokens]), len(tokens))[0, -1].argmax())
        if likeliest == SEPARATOR:
            break
        tokens.append(likeliest)
    return bytes(tokens[len(PROMPT.encode()) :]).decode(errors="replace")


@pytest.mark.parametrize(("ranks", "layout"), [(1, "zigzag"), (2, "zigzag"), (3, "striped"), (3, "contiguous")])
def test_greedy_text_is_that_of_the_whole_sequence(ranks: int, layout: str, trained: Path, ranks_of) -> None:
    first, *others = ranks_of(ranks).run(generate, replace(GREEDY, checkpoint=trained, layout=layout))
    assert first.code == 0, first.errors
    assert first.out == without_a_cache(trained)
    assert len(set(first.out)) > 20 and "ß" in first.out  # a text, with characters of two bytes
    assert all(other == Ended(0, "", "") for other in others)


def test_the_end_tells_rates_and_the_memory_of_a_rank(trained: Path, ranks_of) -> None:
    told = [ranks_of(ranks).run(generate, replace(GREEDY, checkpoint=trained))[0].errors for ranks in (1, 2)]
    tokens = len(PROMPT.encode())
    pattern = rf"prefill: {tokens - 1} tokens in [\d.]+ s, [\d,]+ tokens/s; decoding: {NEW} tokens, [\d.,]+ tokens/s; "
    alone, halved = (float(re.search(pattern + r"cache: ([\d.]+) MiB", text)[1]) for text in told)  # type: ignore[index]
    kept = 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, dim, bytes a number
    assert alone == pytest.approx((tokens + NEW) * kept / 2**20, abs=0.01)
    assert halved == pytest.approx(alone / 2, abs=0.01)


def test_a_seed_gives_one_text_on_any_number_of_ranks(trained: Path, ranks_of) -> None:
    drawn = replace(GREEDY, checkpoint=trained, temperature=1.5, top_p=0.99)
    texts = [ranks_of(ranks).run(generate, drawn)[0].out for ranks in (1, 2, 3)]
    assert texts[0] == texts[1] == texts[2] != without_a_cache(trained)
    assert ranks_of(2).run(generate, replace(drawn, seed=1))[0].out != texts[0]


def test_all_ranks_follow_the_first_ones_choice(trained: Path, ranks_of) -> None:
    """Ranks that draw by themselves would part here, and a rank that parts is refused by the next step."""
    drawn = replace(GREEDY, checkpoint=trained, temperature=1.5)
    ended = ranks_of(3).run(generate_with_a_seed_a_rank, drawn)
    assert [rank.code for rank in ended] == [0, 0, 0], ended[0].errors
    assert ended[0].out == ranks_of(3).run(generate, drawn)[0].out


def test_text_ends_where_it_is_told_to(trained: Path, ranks_of) -> None:
    greedy = without_a_cache(trained)
    assert "ß" in greedy
    out = ranks_of(2).run(generate, replace(GREEDY, checkpoint=trained, stop="ß"))[0].out
    assert out == greedy[: greedy.index("ß") + 1]


def test_an_empty_prompt_and_a_prompt_of_one_byte(trained: Path, ranks_of) -> None:
    for prompt in ("", "Z"):
        ended = ranks_of(3).run(generate, replace(GREEDY, checkpoint=trained, prompt=prompt, max_new_tokens=3))
        assert [rank.code for rank in ended] == [0, 0, 0] and "prefill: 0 tokens" in ended[0].errors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(prompt=None, prompt_file=Path("nowhere.txt")), "nowhere.txt: No such file or directory"),
        (dict(checkpoint=Path("nowhere")), "--checkpoint: nowhere holds no checkpoint; name the --out of a run"),
        (dict(checkpoint=Path("step-00000001")), "--checkpoint: step-00000001/manifest.json is missing"),
    ],
)
def test_what_is_not_there_is_refused_on_every_rank(change: dict, words: str, trained: Path, ranks_of) -> None:
    first, second = ranks_of(2).run(generate, replace(GREEDY, **{"checkpoint": trained, **change}))
    assert (first.code, second.code) == (2, 2) and first.out == second.errors == ""
    assert first.errors.count("\n") == 1 and words in first.errors


def test_a_damaged_checkpoint_is_passed_over_and_one_by_name_is_refused(
    trained: Path, tmp_path: Path, ranks_of
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    newest, before = run / "checkpoints" / "step-00000120", run / "checkpoints" / "step-00000060"
    flip(next(newest.glob("*.safetensors")), 0.9)
    by_run, by_name = (ranks_of(2).run(generate, replace(GREEDY, checkpoint=path))[0] for path in (run, newest))
    assert by_run.code == 0 and "step-00000060 is read in its place" in by_run.errors
    assert by_run.out == ranks_of(2).run(generate, replace(GREEDY, checkpoint=before))[0].out
    assert by_name.code == 2 and "is damaged: its SHA-256 is not the one" in by_name.errors


def test_a_checkpoint_of_another_program_is_refused(trained: Path, tmp_path: Path, ranks_of) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for path in run.glob("checkpoints/*/manifest.json"):
        path.write_text(path.read_text().replace("launch/train.py", "another"))
    first, second = ranks_of(2).run(generate, replace(GREEDY, checkpoint=run))
    assert (first.code, second.code) == (2, 2)
    assert "was written by another; expected one of launch/train.py" in first.errors


def test_as_a_command_that_reads_standard_input(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text(PROMPT)
    command = (*torchrun(2), "launch/generate.py", "--checkpoint", trained, "--device", "cpu", "--temperature", "0")
    line = " ".join(str(part) for part in command) + f" --max-new-tokens {NEW} <{tmp_path}/prompt 2>{tmp_path}/errors"
    assert finish(jobs.start("bash", "-c", line)) == without_a_cache(trained)
    assert "Warning" not in (tmp_path / "errors").read_text()


def test_an_interrupted_job_ends_with_a_line(trained: Path) -> None:
    options = ("--prompt", TEXT[:50], "--max-new-tokens", 10**5, "--temperature", 1, "--top-p", 1, "--device", "cpu")
    job = jobs.start(sys.executable, "launch/generate.py", "--checkpoint", trained, *options)
    assert job.stdout is not None and job.stdout.read(1)  # it has begun to write
    job.send_signal(signal.SIGINT)
    output = finish(job, 130)
    assert output.endswith("\ninterrupted\n") and "Traceback" not in output
