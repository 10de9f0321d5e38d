"""The jobs' command line without running a job: list, help, errors, ranks, copies."""

import ast
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from distflash.__main__ import main
from distflash.recipes import deepspeed_config
from distflash.recipes.catalogue import BY_NAME, PACKAGES, RECIPES, Recipe
from distflash.recipes.config import TrainConfig
from distflash.recipes.console import Launch
from distflash.recipes.copying import copy
from distflash.recipes.deepspeed_config import DeepSpeedConfig
from distflash.recipes.options import parse, whole_sentences
from distflash.recipes.ranks import python, ranks_to_start
from distflash.recipes.transformers_config import TransformersConfig
from tests.jobs import ROOT

NAMES = tuple(BY_NAME)


def test_alone_it_says_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{recipe.name} {recipe.line}" in shown for recipe in RECIPES)
    assert all(name in shown for name in ("copy", "doctor", "compile"))


@pytest.mark.parametrize("name", NAMES)
def test_a_job_has_options_with_a_script_and_a_main(name: str) -> None:
    recipe = BY_NAME[name]
    assert (ROOT / "distflash" / "recipes" / f"{recipe.module}.py").is_file()
    options = recipe.load_options()
    assert options.__doc__ is not None and re.search(r"minutes? on two\s+CPU cores", options.__doc__)
    assert name == "verify" or f'script("{name}")' in (ROOT / "launch" / recipe.script).read_text()


def test_each_training_job_has_a_folder_of_its_own() -> None:
    outs = {name: BY_NAME[name].load_options()().out for name in NAMES if name.startswith(("train", "uptrain"))}  # type: ignore[attr-defined]
    assert len(set(outs.values())) == len(outs) == 4
    read = [
        BY_NAME["generate"].load_options()().checkpoint,  # type: ignore[attr-defined]
        BY_NAME["evaluate"].load_options()().checkpoint,  # type: ignore[attr-defined]
        BY_NAME["uptrain"].load_options()().source,  # type: ignore[attr-defined]
    ]
    assert read == [outs["train"]] * 3


def test_the_jobs_of_the_page_run_in_a_row() -> None:
    """Each has all it needs: a folder of its own, and a checkpoint that a job before it has written."""
    page = (ROOT / "docs" / "console.md").read_text()
    commands = [shlex.split(line) for line in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)[0].splitlines()]
    assert {command[1] for command in commands} == set(NAMES) - {"verify"}
    written: set[Path] = set()
    for program, name, *options in commands:
        kind = BY_NAME[name].load_options()
        job = parse(Launch[kind], [*options, "--device", "cpu"]).job  # type: ignore[valid-type]
        assert program == "distflash"
        assert all(getattr(job, read) in written for read in ("checkpoint", "source") if hasattr(job, read))
        out = getattr(job, "out", None)
        assert out not in written
        written |= {out} if out else set()


@pytest.mark.parametrize("name", [*NAMES, "doctor", "copy", "compile"])
def test_help_loads_no_torch(name: str) -> None:
    program = (
        f"import sys, distflash.__main__ as cli\ntry: cli.main([{name!r}, '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=250).stdout
    assert f"usage: distflash {name}" in shown
    assert ("--ranks" in shown) == (name not in ("copy",))


@pytest.mark.parametrize("arguments", [(), ("train", "--help"), ("doctor", "--help")])
def test_a_reader_that_leaves_is_no_error(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "distflash", *arguments]
    ended = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert ended.stdout is not None and ended.stderr is not None
    ended.stdout.close()
    # argparse passes over such an error itself where nothing is buffered.
    assert ended.stderr.read() == "" and ended.wait() in (0, 128 + signal.SIGPIPE)


@pytest.mark.parametrize("name", NAMES)
def test_help_breaks_lines_only_where_they_are_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    lines = (line[2:].rstrip(" │") for line in capsys.readouterr().out.splitlines())  # in a frame, or without one
    rows = [line for line in lines if line.startswith(("--", " " * 10))]
    width, compared = max(map(len, rows)), 0
    for row, after in pairwise(rows):
        column = len(after) - len(after.lstrip())
        if column > 10 and row[column - 1 : column] == " " and row[column : column + 1].strip():
            compared += 1
            assert len(row) + 1 + len(after.split()[0]) > width, (row, after)
    assert compared > 10


def test_helps_are_whole_sentences() -> None:
    @whole_sentences
    class Plain:
        kept: int = 3
        """One
        line."""

    assert Plain.kept.metadata == {"help": "One line."} and Plain.kept.default == 3  # type: ignore[attr-defined]
    assert all("\n" not in field.metadata.get("help", "") for field in fields(TrainConfig))
    assert all(field.metadata["help"] for field in fields(TrainConfig) if field.name not in ("model", "optimizer"))


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(PACKAGES, "trainer", ("no_such_package", "tyro", "nor_this_one"))
    assert main(["train-transformers", "--help"]) == 2
    words = "train-transformers: not installed: no_such_package, nor_this_one; pip install 'distflash[train,trainer]'"
    assert words in capsys.readouterr().err
    BY_NAME["train"].check_extras()


def test_extras_are_those_of_the_package() -> None:
    declared = (ROOT / "setup.cfg").read_text().partition("[options.extras_require]")[2].partition("\n[")[0]
    for extra, packages in PACKAGES.items():
        listed = re.search(rf"^{extra} =\n((?:    .*\n)+)", declared, re.MULTILINE)
        assert listed is not None and all(package in listed[1] for package in packages)
    assert {extra for recipe in RECIPES for extra in recipe.extras} == set(PACKAGES)


@pytest.mark.parametrize(
    ("asked", "device", "gpus", "count"),
    [(None, "cpu", 0, 1), (3, "cpu", 0, 3), (3, "cpu", 2, 3), (None, "cuda", 4, 4), (2, "cuda", 4, 2)],
)
def test_ranks_are_as_many_as_asked_for_or_one_a_gpu(
    asked: int | None, device: str, gpus: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert ranks_to_start(asked, device) == count


def test_ranks_that_cannot_be_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for asked, words in ((3, "--ranks: got 3, expected at most 2, a GPU for each rank"), (0, "at least 1")):
        with pytest.raises(ValueError, match=words):
            ranks_to_start(asked, "cuda")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks_to_start(None, "cuda") == ranks_to_start(4, "cuda") == 1
    with pytest.raises(ValueError, match="--ranks: got 2, expected nothing, or the 4 ranks that a launcher"):
        ranks_to_start(2, "cuda")


def test_a_job_is_refused_before_its_ranks_start() -> None:
    with pytest.raises(ValueError, match="--data-parallel: got 2, expected a divisor of the 3 ranks"):
        Launch(TrainConfig(data_parallel=2, device="cpu"), ranks=3)
    with pytest.raises(ValueError, match=r"--pipe: got 2 .* divides the 3 ranks"):
        Launch(DeepSpeedConfig(pipe=2, device="cpu"), ranks=3)
    assert Launch(DeepSpeedConfig(pipe=2, device="cpu"), ranks=4).count == 4
    other = replace(TransformersConfig(device="cpu", seq_len=1022), device="cpu")
    other.check_ranks(3)  # any length is right for distflash


def test_ranks_find_modules_where_their_parent_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", ["/bin"])
    assert "-P" in python()
    monkeypatch.setattr(sys, "path", ["", "/bin"])
    assert "-P" not in python()


def test_configurations_of_deepspeed_come_with_the_package(tmp_path: Path) -> None:
    assert set(deepspeed_config.BUNDLED) == {"zero1", "zero3"}
    for name, path in deepspeed_config.BUNDLED.items():
        same = ROOT / "launch" / "configs" / f"{name}.json"
        assert same.read_bytes() == path.read_bytes()
        named, given = (DeepSpeedConfig(deepspeed=each, device="cpu").for_deepspeed() for each in (Path(name), same))
        assert named == given
    with pytest.raises(ValueError, match="--deepspeed: got zero2, expected zero1, zero3, or a JSON file"):
        DeepSpeedConfig(deepspeed=Path("zero2"))


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_module_and_runs(name: str, tmp_path: Path) -> None:
    recipe = BY_NAME[name]
    path = copy(recipe, tmp_path)
    assert path == tmp_path / recipe.script
    text = path.read_text()
    compile(text, str(path), "exec")
    assert (ROOT / "distflash" / "recipes" / f"{recipe.module}.py").read_text() in text
    assert "from distflash.recipes.options import parse" in text and len(max(text.splitlines()[:5], key=len)) <= 120


def test_a_copy_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text("mine")
    assert main(["copy", "train", str(mine)]) == 2
    assert f"distflash copy: TO: got {mine}, which exists" in capsys.readouterr().err and mine.read_text() == "mine"
    assert main(["copy", "train", str(tmp_path / "nowhere" / "mine.py")]) == 2
    assert main(["copy", "generate", str(tmp_path)]) == 0
    assert "generate.py is yours: torchrun" in capsys.readouterr().out


def test_options_of_the_console_are_those_of_the_script() -> None:
    launch = parse(Launch[TrainConfig], ["--ranks", "2", "--device", "cpu", "--layers", "3", "--seq-len", "77"])
    assert launch.job == parse(TrainConfig, ["--device", "cpu", "--layers", "3", "--seq-len", "77"])
    assert launch.ranks == launch.count == 2


def test_names_are_commands_and_scripts() -> None:
    assert Recipe("a-b", "", "m", ("o", "O")).script == "a_b.py"
    assert len(BY_NAME) == len(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_copy_sets_what_libraries_read_before_it_imports_them(recipe: Recipe, tmp_path: Path) -> None:
    tree = ast.parse(copy(recipe, tmp_path).read_text())
    compile(tree, "copy", "exec")  # with `from __future__` where it is allowed
    early = [node for node in tree.body if isinstance(node, ast.If)][:-1]
    imports = next(node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))
    assert len(early) == (recipe.name == "train-deepspeed")
    assert all("before_main()" in ast.unparse(node) and node.lineno < imports.lineno for node in early)
