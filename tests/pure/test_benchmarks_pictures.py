"""Plots of benchmarks are made from records alone, with readable names."""

import json

import pytest

from benchmarks import common, decode_ranks, pictures, redraw, ring, ring_steps

figures, text = (pytest.importorskip(f"matplotlib.{name}") for name in ("figure", "text"))

RECORDS = sorted(common.RESULTS.glob("*.json"))
# Names in records that say nothing to who has not read the benchmark.
RAW = ("single", "ring", "window4096", "SDPA", "H32/8", "cudnn")


def texts(figure):
    """All that is written on a figure."""
    return [each.get_text() for each in figure.findobj(text.Text) if each.get_text()]


@pytest.mark.parametrize("file", RECORDS, ids=lambda file: file.stem)
def test_committed_records_draw_in_words(file):
    draw = redraw.drawn_by(file.stem)
    if draw is None:
        assert not file.with_suffix(".png").exists(), "there is a picture that nothing can draw again"
        return
    figure = figures.Figure(layout="constrained")
    draw(figure, json.loads(file.read_text()))
    figure.canvas.draw()
    written = texts(figure)
    assert len(written) > 5 and all(axes.has_data() for axes in figure.axes)
    assert not [words for words in written if words in RAW or words.startswith(("B1 ", "B8 "))]


def test_the_longest_beginning_says_who_draws():
    assert redraw.drawn_by("ring-causal-2") is ring.draw
    assert redraw.drawn_by("ring-steps-window4096-zigzag-8") is ring_steps.draw
    assert redraw.drawn_by("decode-2") is decode_ranks.draw
    assert redraw.drawn_by("decode-sweep") is None and redraw.drawn_by("host_calls") is None


def test_a_picture_says_where_it_was_measured(tmp_path):
    env = {"gpus": ["NVIDIA H200"] * 2, "torch": "2.11.0", "triton": "3.6.0", "sources": "0123abcd"}
    seen = []

    def draw(figure, record):
        figure.subplots().plot([0, 1], record["values"])
        seen.append(figure)

    pictures.save({"environment": env, "values": [3, 4]}, draw, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes().startswith(b"\x89PNG")
    assert "2 x NVIDIA H200, torch 2.11.0, triton 3.6.0, sources 0123abcd" in texts(seen[0])


@pytest.mark.parametrize(
    ("error_line", "words"),
    [
        (common.Shape(1, 131072, 32, 8, 128, 128), "128K tokens, 32:8 heads, D128"),
        (common.Shape(8, 2048, 16, 16, 192, 128), "8 x 2K tokens, 16 heads, D192/128"),
        (common.Shape(1, 11520, 4, 4, 64, 64), "11520 tokens, 4 heads, D64"),
    ],
)
def test_shapes_in_words(error_line, words):
    assert pictures.shape(str(error_line)) == words


def test_numbers_of_tokens():
    assert [pictures.tokens(n) for n in (5, 1000, 1024, 3 * 2**20, 2**20 + 1024)] == ["5", "1000", "1K", "3M", "1025K"]
