"""Rotary frequencies: their formulas, the layouts of the dict, their stock forms, and their errors."""

import doctest
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longattn.rope
from longattn.rope import rope_frequencies, rope_layers, stock_parameters

THETA = 10_000.0
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def plain(theta, dim):
    return [theta ** (-2 * i / dim) for i in range(dim // 2)]


def assert_close(inv_freq, expected):
    torch.testing.assert_close(inv_freq, torch.tensor(expected, dtype=torch.float64), rtol=1e-13, atol=0.0)


def test_examples_run():
    finder = doctest.DocTestFinder(recurse=False)
    runner = doctest.DocTestRunner()
    for name in longattn.rope.__all__:
        for example in finder.find(getattr(longattn.rope, name), name, globs={**vars(longattn.rope)}):
            runner.run(example)
    assert runner.summarize(verbose=False).failed == 0
    assert runner.tries >= 6


@settings(deadline=None, max_examples=40)
@given(theta=st.floats(1.5, 1e8), half=st.integers(2, 128), factor=st.floats(1.0, 128.0))
def test_ntk_frequencies_follow_the_raised_theta(theta, half, factor):
    dim = 2 * half
    rope = {"rope_type": "ntk", "rope_theta": theta, "factor": factor}
    inv_freq, scaling = rope_frequencies(rope, dim)
    assert scaling == 1.0
    assert_close(inv_freq, [w * factor ** (-2 * i / (dim - 2)) for i, w in enumerate(plain(theta, dim))])


def test_ntk_keeps_the_shortest_wavelength_and_stretches_the_longest_by_factor():
    base, _ = rope_frequencies({"rope_theta": THETA}, 128)
    raised, _ = rope_frequencies({"rope_type": "ntk", "rope_theta": THETA, "factor": 8.0}, 128)
    assert raised[0] == base[0] == 1.0
    assert float(base[-1] / raised[-1]) == pytest.approx(8.0, rel=1e-13)


def test_dynamic_grows_only_past_the_present_length():
    rope = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}
    for seq_len in (None, 1, 4096):
        assert_close(rope_frequencies(rope, 64, max_position_embeddings=4096, seq_len=seq_len)[0], plain(THETA, 64))
    stretch = 2.0 * 8192 / 4096 - 1.0
    expected = plain(THETA * stretch ** (64 / 62), 64)
    assert_close(rope_frequencies(rope, 64, max_position_embeddings=4096, seq_len=8192)[0], expected)


def test_by_parts_is_yarn_without_temperature():
    rope = {"rope_theta": THETA, "factor": 16.0, "original_max_position_embeddings": 2048}
    parts, parts_scaling = rope_frequencies({**rope, "rope_type": "by-parts"}, 128)
    yarn, yarn_scaling = rope_frequencies({**rope, "rope_type": "yarn"}, 128)
    assert torch.equal(parts, yarn)
    assert parts_scaling == 1.0
    assert yarn_scaling == pytest.approx(0.1 * math.log(16.0) + 1.0, rel=1e-15)


def test_by_parts_keeps_fast_turns_and_interpolates_slow_ones():
    rope = {"rope_type": "by-parts", "rope_theta": THETA, "factor": 16.0, "original_max_position_embeddings": 2048}
    ratio = rope_frequencies({"rope_theta": THETA}, 128)[0] / rope_frequencies(rope, 128)[0]
    turns = [2048 * w / (2 * math.pi) for w in plain(THETA, 128)]
    assert all(r == 1.0 for r, t in zip(ratio.tolist(), turns, strict=True) if t > 40)
    assert all(r == pytest.approx(16.0) for r, t in zip(ratio.tolist(), turns, strict=True) if t < 0.8)
    assert sorted(ratio.tolist()) == ratio.tolist()


@pytest.mark.parametrize("theta", [THETA, 500.0])  # with 500 the ramp's end lies past the table
def test_by_parts_heeds_truncate(theta):
    rope = {"rope_type": "by-parts", "rope_theta": theta, "factor": 4.0, "original_max_position_embeddings": 4096}
    low, high = (64 * math.log(4096 / (beta * 2 * math.pi)) / (2 * math.log(theta)) for beta in (32, 1))
    for truncate, (start, end) in ((False, (low, high)), (True, (math.floor(low), math.ceil(high)))):
        ramp = [min(max((i - start) / (end - start), 0.0), 1.0) for i in range(32)]
        expected = [w * (1 - r) + w / 4.0 * r for w, r in zip(plain(theta, 64), ramp, strict=True)]
        assert_close(rope_frequencies({**rope, "truncate": truncate}, 64)[0], expected)


@pytest.mark.parametrize(("theta", "length", "factor"), [(10.0, 10**9, 1.0), (THETA, 4, 8.0)])
def test_by_parts_where_the_ramp_lies_outside_the_table(theta, length, factor):
    rope = {"rope_theta": theta, "factor": 8.0, "original_max_position_embeddings": length, "rope_type": "by-parts"}
    inv_freq, _ = rope_frequencies(rope, 32)
    # all frequencies turn often within 10**9 tokens, none turns once within 4
    assert_close(inv_freq[1:], [w / factor for w in plain(theta, 32)[1:]])


@pytest.mark.parametrize(
    ("keys", "scaling"),
    [
        ({"attention_factor": 1.25}, 1.25),
        ({"attention_factor": 1}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)),
        ({"mscale": 0.707}, 0.1 * math.log(40) + 1),
        ({"mscale": 1.0, "mscale_all_dim": 0}, 0.1 * math.log(40) + 1),
    ],
)
def test_yarn_attention_scaling(keys, scaling):
    rope = {"rope_type": "yarn", "rope_theta": THETA, "factor": 40, "original_max_position_embeddings": 4096, **keys}
    assert rope_frequencies(rope, 64)[1] == pytest.approx(scaling, rel=1e-15)


def test_longrope_chooses_its_list_by_the_length():
    rope = {
        "rope_type": "longrope",
        "rope_theta": THETA,
        "short_factor": [1.0, 1.0, 1.5, 2.0],
        "long_factor": [1.0, 2.0, 16.0, 64.0],
        "original_max_position_embeddings": 4096,
    }
    for seq_len, key in ((None, "short_factor"), (4096, "short_factor"), (4097, "long_factor")):
        inv_freq, scaling = rope_frequencies(rope, 8, max_position_embeddings=131072, seq_len=seq_len)
        assert_close(inv_freq, [w / e for w, e in zip(plain(THETA, 8), rope[key], strict=True)])
        assert scaling == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-15)
    both = {**rope, "short_mscale": 1.0, "long_mscale": 1.25}
    assert [rope_frequencies(both, 8, seq_len=n)[1] for n in (4096, 4097)] == [1.0, 1.25]


def test_llama3_blends_between_its_two_wavelengths():
    inv_freq, scaling = rope_frequencies(LLAMA3, 128)
    assert scaling == 1.0
    expected = []
    for w in plain(500_000.0, 128):
        wavelength = 2 * math.pi / w
        blend = (8192 / wavelength - 1.0) / (4.0 - 1.0)
        slow, fast = wavelength > 8192, wavelength < 2048
        expected.append(w / 8 if slow else w if fast else (1 - blend) * w / 8 + blend * w)
    assert_close(inv_freq, expected)


def test_proportional_keeps_the_full_width_and_stops_the_rest():
    rope = {"rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25, "factor": 2.0}
    inv_freq, _ = rope_frequencies(rope, 64)
    assert_close(inv_freq, [w / 2 for w in plain(1e6, 64)[:8]] + [0.0] * 24)


def test_partial_rotary_narrows_the_table():
    inv_freq, _ = rope_frequencies({"rope_theta": THETA, "partial_rotary_factor": 0.25}, 96)
    assert_close(inv_freq, plain(THETA, 24))


# Layouts of the dict


def test_older_layouts_give_the_same_frequencies():
    expected, _ = rope_frequencies({"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}, 64)
    for rope in (
        {"type": "linear", "factor": 2.0, "rope_theta": THETA},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": THETA},
        {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_theta": 10_000, "partial_rotary_factor": None},
    ):
        assert torch.equal(rope_frequencies(rope, 64)[0], expected)
    bare, _ = rope_frequencies({"rope_scaling": None, "rope_theta": THETA}, 64)
    assert_close(bare, plain(THETA, 64))


def test_keys_of_other_types_are_ignored():
    rope = {"rope_type": "default", "rope_theta": THETA, "beta_fast": 32, "mrope_section": [16, 24, 24]}
    assert_close(rope_frequencies(rope, 64)[0], plain(THETA, 64))


def test_layers_lists_each_type_that_has_rope():
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}, "linear_attention": None}
    assert rope_layers(nested) == {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert rope_layers({**nested, "rope_theta": 1e4}) == rope_layers(nested)
    assert rope_layers({"rope_theta": 1e6}) == {None: {"rope_theta": 1e6}}
    with pytest.raises(ValueError, match=r"one dict per layer type \('full_attention', 'sliding_attention'"):
        rope_frequencies(nested, 64)
    with pytest.raises(ValueError, match=r"rope_layers: rope_parameters\['full'\] must be a dict or None, got 3"):
        rope_layers({"full": 3, "sliding": {"rope_theta": 1e4}})


# Stock forms


@settings(deadline=None, max_examples=40)
@given(
    rope_type=st.sampled_from(["ntk", "by-parts"]),
    theta=st.floats(100.0, 1e8),
    factor=st.floats(1.0, 64.0),
    share=st.sampled_from([1.0, 0.5]),
    half=st.integers(2, 64),
)
def test_stock_parameters_keep_the_frequencies(rope_type, theta, factor, share, half):
    rope = {"rope_type": rope_type, "rope_theta": theta, "factor": factor, "partial_rotary_factor": share}
    rope["original_max_position_embeddings"] = 4096
    stock = stock_parameters(rope, 4 * half)
    assert stock["rope_type"] in longattn.rope.SAVED_TYPES
    assert stock["partial_rotary_factor"] == share
    assert "factor" not in stock or rope_type == "by-parts"
    inv_freq, scaling = rope_frequencies(rope, 4 * half)
    stock_inv_freq, stock_scaling = rope_frequencies(stock, 4 * half)
    assert torch.equal(inv_freq, stock_inv_freq)
    assert scaling == stock_scaling == 1.0


def test_stock_parameters_leave_stock_types_and_their_argument_alone():
    assert stock_parameters(LLAMA3, 128) == LLAMA3
    rope = {"type": "ntk", "rope_theta": THETA, "factor": 4.0}
    stock = stock_parameters(rope, 64)
    assert stock == {"rope_type": "default", "rope_theta": pytest.approx(THETA * 4 ** (64 / 62), rel=1e-15)}
    assert rope == {"type": "ntk", "rope_theta": THETA, "factor": 4.0}


def test_stock_parameters_of_nested_dicts_convert_each_layer_type():
    ntk = {"rope_type": "ntk", "rope_theta": 1e6, "factor": 4.0}
    nested = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": ntk, "other": None}
    stock = stock_parameters(nested, 64)
    assert stock == {**nested, "full_attention": stock_parameters(ntk, 64)}
    assert stock["full_attention"]["rope_type"] == "default"


# Errors

YARN = {"rope_type": "yarn", "rope_theta": THETA, "factor": 4.0, "original_max_position_embeddings": 4096}
LONGROPE = {"rope_type": "longrope", "rope_theta": THETA, "original_max_position_embeddings": 4096, "factor": 2.0}


@pytest.mark.parametrize(
    ("rope", "head_dim", "message"),
    [
        (
            {**YARN, "factor": math.nan},
            64,
            r"rope_parameters\['factor'\] must be a finite number of at least 1, got nan",
        ),
        ({**YARN, "factor": math.inf}, 64, r"\['factor'\] must be a finite number of at least 1, got inf"),
        ({**YARN, "factor": -2.0}, 64, r"\['factor'\] must be a finite number of at least 1, got -2.0"),
        ({**YARN, "factor": 0.5}, 64, r"\['factor'\] must be a finite number of at least 1, got 0.5"),
        ({**YARN, "factor": "4"}, 64, r"\['factor'\] must be a finite number of at least 1, got '4'"),
        ({**YARN, "factor": True}, 64, r"\['factor'\] must be a finite number of at least 1, got True"),
        ({**YARN, "factor": None}, 64, "of type 'yarn' needs 'factor'"),
        ({**YARN, "original_max_position_embeddings": None}, 64, "needs 'original_max_position_embeddings'"),
        ({**YARN, "rope_theta": None}, 64, "needs 'rope_theta'"),
        ({**YARN, "rope_theta": -1.0}, 64, r"\['rope_theta'\] must be a finite number above 1, got -1.0"),
        ({**YARN, "beta_fast": 1}, 64, r"\['beta_fast'\] must be above beta_slow 1, got 1"),
        ({**YARN, "truncate": "no"}, 64, r"\['truncate'\] must be true or false, got 'no'"),
        ({**YARN, "attention_factor": -1.0}, 64, r"\['attention_factor'\] must be a finite number above 0, got -1.0"),
        (
            {**YARN, "rope_type": "by-parts", "attention_factor": 1.2},
            64,
            "got attention_factor 1.2; use rope_type 'yarn'",
        ),
        ({**YARN, "rope_type": "yarm"}, 64, "one of default, linear, ntk, .* got 'yarm'; did you mean 'yarn'"),
        ({**YARN, "beta_fst": 32}, 64, "unknown key 'beta_fst'; did you mean 'beta_fast'"),
        ({"rope_theta": THETA, "factor": 4.0}, 64, "has 'factor' but no 'rope_type'"),
        ({"rope_theta": THETA, "rope_type": "ntk", "factor": 2.0}, 2, "'ntk' needs a rotary dim above 2, got 2"),
        ({"rope_theta": THETA}, 65, "head_dim must be an even number of at least 2, got 65"),
        ({"rope_theta": THETA}, 0, "head_dim must be an even number of at least 2, got 0"),
        ({"rope_theta": THETA, "partial_rotary_factor": 0.3}, 64, "the rotary dim must be an even number .* got 19"),
        ({"rope_theta": THETA, "partial_rotary_factor": 1.5}, 64, "must be at most 1, got 1.5"),
        ({**LONGROPE, "long_factor": [1.0] * 4}, 8, "needs 'short_factor'"),
        (
            {**LONGROPE, "short_factor": [1.0] * 4, "long_factor": [1.0] * 3},
            8,
            r"\['long_factor'\] must have 4 .* got 3",
        ),
        ({**LONGROPE, "short_factor": [1.0, 0.0, 1.0, 1.0]}, 8, r"\['short_factor'\]\[1\] must be .* above 0, got 0.0"),
        ({**LONGROPE, "short_factor": 1.0}, 8, r"\['short_factor'\] must be a list of numbers, got 1.0"),
        ({**LLAMA3, "high_freq_factor": 1.0}, 64, r"\['high_freq_factor'\] must be above low_freq_factor 1, got 1"),
    ],
)
def test_bad_parameters_are_refused(rope, head_dim, message):
    with pytest.raises(ValueError, match=rf"^rope_frequencies: .*{message}"):
        rope_frequencies(rope, head_dim)


def test_bad_arguments_are_refused():
    rope = {"rope_type": "dynamic", "rope_theta": THETA, "factor": 2.0}
    with pytest.raises(ValueError, match="'dynamic' needs max_position_embeddings"):
        rope_frequencies(rope, 64, seq_len=8192)
    with pytest.raises(ValueError, match="seq_len must be at least 1, got 0"):
        rope_frequencies(rope, 64, max_position_embeddings=4096, seq_len=0)
    with pytest.raises(TypeError, match="max_position_embeddings must be an int or None, got float"):
        rope_frequencies(rope, 64, max_position_embeddings=4096.0)
    with pytest.raises(TypeError, match="rope_parameters must be a dict, got list"):
        rope_frequencies([], 64)
    with pytest.raises(TypeError, match="head_dim must be an int, got float"):
        rope_frequencies(rope, 64.0)
    with pytest.raises(ValueError, match="^stock_parameters: .*needs 'rope_theta'"):
        stock_parameters({"rope_type": "ntk", "factor": 2.0}, 64)
