"""The pictures: what their cells and curves say, and the command line that writes them."""

import json

import pytest
import torch

pytest.importorskip("matplotlib")
typer_testing = pytest.importorskip("typer.testing")

from longattn.cli.plot import app  # noqa: E402
from longattn.pattern import parse_pattern  # noqa: E402
from longattn.plots import plot_masks, plot_wavelengths, visible_cells, visible_pairs  # noqa: E402

PNG = b"\x89PNG\r\n\x1a\n"


def run(*arguments):
    return typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def sees(pattern, query, key, shift):
    """One pair, from the definitions alone."""
    if key > query:
        return False
    start = {"full": 0, "window": query - pattern.size + 1, "group": 0}[pattern.kind]
    if pattern.kind == "group":
        start = (query + shift) // pattern.size * pattern.size - shift
    return key >= start or key < pattern.sinks


@pytest.mark.parametrize("text", ["full", "window:8+sinks:2", "window:1", "group:8+shift", "group:5+shift:3+sinks:1"])
@pytest.mark.parametrize("num_tokens", [1, 13, 32])
def test_cells_show_what_each_query_sees(text, num_tokens):
    pattern = parse_pattern(text)
    for shift in {0, pattern.shift}:
        cells = visible_cells(pattern, num_tokens, shift)
        expected = [[sees(pattern, q, k, shift) for k in range(num_tokens)] for q in range(num_tokens)]
        assert ((cells >= 2) == torch.tensor(expected)).all()
        assert ((cells == 0) == torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)).all()
        assert visible_pairs(pattern, num_tokens, shift) == torch.tensor(expected).sum()


def test_cells_of_a_long_text_keep_its_outline():
    cells = visible_cells(parse_pattern("window:4096+sinks:4"), 16384, max_cells=64)
    assert cells.shape == (64, 64)
    assert (cells[16:, 0] == 3).all() and (cells[:16, 0] == 2).all()
    assert (cells >= 2).sum(-1).tolist() == [min(row + 1, 17 if row > 15 else row + 1) for row in range(64)]


def test_masks_show_both_halves_of_shifted_heads():
    figure = plot_masks([parse_pattern("window:4"), parse_pattern("group:8+shift")], 16, num_heads=6)
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == ["window:4\nall heads", "group:8+shift\nheads 0-2", "group:8+shift\nheads 3-5"]
    pictures = [axes.images[0].get_array() for axes in figure.axes]
    assert not (pictures[1] == pictures[2]).all()
    one = plot_masks([parse_pattern("group:8+shift")], 16, num_heads=1)
    assert [axes.get_title() for axes in one.axes] == ["group:8+shift\nhead 0"]
    assert (one.axes[0].images[0].get_array() == pictures[2]).all()  # heads from H // 2 = 0 on are shifted


def test_wavelengths_are_drawn_in_tokens_with_the_context_across():
    inv_freq = torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64)
    figure = plot_wavelengths({"half": inv_freq / 2}, inv_freq, context=100)
    left, right = figure.axes
    curve = left.lines[1].get_ydata()
    assert curve[:2] == pytest.approx([12.566370614, 125.66370614])
    assert curve[2] != curve[2]  # a channel that does not turn is not drawn
    assert left.get_legend().get_texts()[1].get_text() == "half (1 of 3 do not turn)"
    assert left.get_yscale() == "log"
    assert list(left.lines[2].get_ydata()) == [100, 100]
    assert right.lines[1].get_ydata()[:2] == pytest.approx([2.0, 2.0])


def test_rope_command_writes_a_picture(tmp_path):
    out = tmp_path / "rope.png"
    for _ in range(2):  # a picture is written over
        result = run("rope", "--type", "yarn", "--type", "dynamic", "--factor", 4, "--out", out)
        assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(PNG)


V4 = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "rope_theta": 1e4,
    "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 4.0},
}
NESTED = {
    "head_dim": 16,
    "max_position_embeddings": 128,
    "layer_types": ["sliding_attention", "full_attention"],
    "per_layer_config": {"1": {"head_dim": 32}},
    "rope_parameters": {
        "full_attention": {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@pytest.mark.parametrize("config", [V4, NESTED, {"text_config": NESTED}], ids=["v4", "nested", "text_config"])
def test_rope_command_reads_a_checkpoint(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = run("rope", tmp_path, "--type", "linear", "--out", tmp_path / "rope.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "rope.png").read_bytes().startswith(PNG)


def test_mask_command_writes_a_picture(tmp_path):
    out = tmp_path / "mask.png"
    result = run("mask", "window:8+sinks:2", "3 x group:8+shift, 1 x full", "--tokens", 32, "--heads", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert out.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rope", "--type", "yarm"], "got 'yarm'; did you mean 'yarn'?"),
        (["rope", "--factor", "0.5"], "rope_parameters['factor'] must be a finite number of at least 1, got 0.5"),
        (["rope", "EMPTY"], "must be a checkpoint's folder, it has no config.json"),
        (["mask", "window:x"], "expected a whole number >= 0, got 'x'"),
        (["mask", "full", "--tokens", "0"], "num_tokens must be at least 1, got 0"),
        (["mask", "full", "--out", "EMPTY/none/mask.png"], "cannot open"),
        (["mask", "full", "--out", "EMPTY/mask.foo"], "'foo' is not supported"),
    ],
)
def test_errors_are_one_line_and_exit_with_2(tmp_path, arguments, message):
    arguments = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    result = run(*arguments, *([] if "--out" in arguments else ["--out", tmp_path / "x.png"]))
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_without_theta_is_not_given_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"head_dim": 64, "max_position_embeddings": 128}))
    assert "config.json has no rope_theta; give --theta" in run("rope", tmp_path).output
    assert run("rope", tmp_path, "--theta", 1e4, "--out", tmp_path / "rope.png").exit_code == 0
