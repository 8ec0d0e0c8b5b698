"""Any arguments for the ops: an error of a documented type that names op and argument, or a right and finite result."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import dense, half_shifts, visible_mask

import longattn

SETTINGS = settings(
    max_examples=400,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn]
INTS = st.one_of(
    st.integers(-3, 40), st.sampled_from([2**31, 2**60, 2**63 - 1, 2**63, 2**64, 10**30, -(2**63), -(2**70)])
)
WINDOWS = st.integers(1, 40) | st.tuples(st.integers(-1, 40), st.integers(-1, 40))
# what is no number of tokens, or none at all
ODD = st.sampled_from(
    [True, False, None, 1.0, 2.5, math.nan, math.inf, "8", b"8", [], (), [1], (1, 2, 3), {}, torch.ones(2)]
)
NUMBERS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.125, 30.0, 1e-30, 1e4, 5e-324, 1e300, math.inf, -math.inf, math.nan]),
    st.floats(-100, 100),
    INTS,
    ODD,
)


def mostly(common, rare):
    """`common`, and once in six `rare`."""
    return st.integers(0, 5).flatmap(lambda number: rare if number == 5 else common)


def draw_tensor(draw, shape, dtype=None):
    """A tensor of finite numbers, in some order of strides, on the CPU or without memory."""
    dtype = dtype if dtype is not None else draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 100)))
    order = draw(st.permutations(range(len(shape)))) if draw(st.integers(0, 3)) == 0 else list(range(len(shape)))
    x = torch.randn([shape[i] for i in order], generator=generator)
    x = x.to(dtype) if not dtype.is_complex else x.to(torch.complex64)
    x = x.permute([order.index(i) for i in range(len(shape))])
    how = draw(st.integers(0, 9))
    if how == 0:
        x = torch.stack([x, x], -1)[..., 0]  # no two channels beside each other
    if how == 1 and shape and shape[0] > 0:
        x = x[:1].expand(shape)
    return x


@st.composite
def attention_arguments(draw):
    """Mostly what fits, with a few things that may not."""
    odd = draw(st.sampled_from(["none", "none", "none", "query", "key", "value", "options", "rows", "device"]))
    batch, kv_heads, group = draw(st.integers(0, 2)), draw(st.sampled_from([2, 1, 0])), draw(st.integers(1, 3))
    sk, dim = draw(st.sampled_from([0, 1, 5, 33, 70])), draw(st.sampled_from([8, 1, 17, 0]))
    sq = draw(st.sampled_from(sorted({0, min(1, sk), sk}, reverse=True)))
    dtype = draw(st.sampled_from(DTYPES))
    shapes = {"query": [batch, kv_heads * group, sq, dim]}
    shapes["key"] = shapes["value"] = [batch, kv_heads, sk, dim]
    tensors = {name: draw_tensor(draw, shape, dtype) for name, shape in shapes.items()}
    if odd in tensors:
        shape = draw(st.lists(st.integers(0, 5), max_size=5))
        dtype = draw(st.sampled_from(DTYPES + OTHER_DTYPES))
        tensors[odd] = draw_tensor(draw, shape, dtype) if draw(st.booleans()) else draw(ODD)
    if odd == "device":
        some = draw(st.sets(st.sampled_from(sorted(tensors)), min_size=1))
        tensors = {name: x.to("meta") if name in some else x for name, x in tensors.items()}
    options = {}
    if odd == "options":
        options = draw(
            st.fixed_dictionaries({}, optional={"scale": NUMBERS, "softcap": NUMBERS, "sink_tokens": INTS | ODD})
        )
        if draw(st.booleans()):
            shape = draw(st.sampled_from([[kv_heads * group], [1], [], [2, 2]]))
            options["sink_logits"] = draw(st.one_of(ODD, st.just(draw_tensor(draw, shape))))
    elif draw(st.booleans()):
        options = {"sink_tokens": draw(st.integers(0, 9)), "softcap": draw(st.sampled_from([0.0, 5.0]))}
    if odd == "rows" or draw(st.integers(0, 3)) == 0:
        ends = st.lists(st.integers(-2, sk + 2), min_size=0, max_size=4)
        fitting = st.lists(st.integers(0, sk), min_size=batch, max_size=batch)
        documents = st.lists(st.integers(0, sk), max_size=3).map(lambda inner: [0, *sorted(inner), sk])
        for name in draw(
            st.sampled_from(
                [["kv_start"], ["kv_end"], ["kv_start", "kv_end"], ["cu_seqlens"], ["cu_seqlens", "kv_end"]]
            )
        ):
            values = draw(mostly(documents if name == "cu_seqlens" else fitting, ends))
            given_rows = torch.tensor(values, dtype=torch.int32)
            others = [given_rows[None], given_rows.to("meta"), given_rows.long(), given_rows.float(), values]
            options[name] = draw(mostly(st.just(given_rows), st.sampled_from(others)))
    return tensors, options


def call(op, *arguments, **options):
    """The op's result, or None where it refuses with an error of a documented type that names it."""
    try:
        return op(*arguments, **options)
    except (TypeError, ValueError) as error:
        assert str(error).startswith(f"{op.__name__}: "), repr(error)
        return None


def assert_right(out, lse, tensors, options, band):
    """Hold a result to the reference; values without memory have their shape only."""
    query, key, value = tensors.values()
    assert out.shape == query.shape and out.dtype == query.dtype and lse.shape == query.shape[:3]
    if out.is_meta:
        return
    assert bool(out.isfinite().all()) and not bool(lse.isnan().any()) and not bool((lse == math.inf).any())
    rows = {name: options[name] for name in ("cu_seqlens", "kv_start", "kv_end") if options.get(name) is not None}
    mask = visible_mask(*query.shape[:3], key.shape[2], sinks=int(options.get("sink_tokens", 0)), **band, **rows)
    shared = {name: float(options[name]) for name in ("scale", "softcap") if options.get(name) is not None}
    shared["sink_logits"] = options.get("sink_logits")
    expected, expected_lse = dense(query, key, value, mask, **shared)
    logits = abs(float(options.get("scale") or 1.0)) + 1.0
    tolerance = {8: 1e-9, 4: 1e-5, 2: 0.05}[query.dtype.itemsize] * min(logits, 20.0) ** 2
    if logits <= 20.0:
        assert torch.allclose(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert torch.allclose(lse.double(), expected_lse, rtol=tolerance, atol=tolerance)


@SETTINGS
@given(
    arguments=attention_arguments(), window=mostly(WINDOWS, INTS | st.tuples(INTS, INTS) | ODD | st.tuples(INTS, ODD))
)
def test_window_attention_is_right_or_refused(arguments, window):
    tensors, options = arguments
    result = call(longattn.window_attention, *tensors.values(), window, return_lse=True, **options)
    if result is not None:
        left, right = (window - 1, 0) if isinstance(window, int) else window
        assert_right(*result, tensors, options, {"window": (left, right)})


@SETTINGS
@given(
    arguments=attention_arguments(),
    group=mostly(st.integers(4, 40), INTS | ODD),
    shift=mostly(st.integers(0, 4), INTS | ODD),
    causal=mostly(st.booleans(), ODD),
)
def test_group_attention_is_right_or_refused(arguments, group, shift, causal):
    tensors, options = arguments
    result = call(
        longattn.group_attention, *tensors.values(), group, shift=shift, causal=causal, return_lse=True, **options
    )
    if result is not None:
        shifts = half_shifts(tensors["query"].shape[1], shift)
        assert_right(*result, tensors, options, {"group": group, "shifts": shifts, "causal": causal})


@st.composite
def rotations(draw):
    batch, tokens, dim = (
        draw(st.integers(0, 2)),
        draw(st.sampled_from([0, 1, 7])),
        draw(st.sampled_from([0, 1, 2, 8, 9])),
    )
    dtype = draw(st.sampled_from(DTYPES))
    query = draw_tensor(draw, [batch, draw(st.integers(0, 3)), tokens, dim], dtype)
    key = draw_tensor(draw, [batch, draw(st.integers(0, 3)), tokens, dim], dtype)
    width = draw(st.integers(0, dim + 1))
    shape = draw(
        st.sampled_from([[tokens, width], [batch, tokens, width], [1, tokens, width], [tokens + 1, width], [width]])
    )
    cos, sin = (draw_tensor(draw, shape, draw(st.sampled_from(DTYPES))) for _ in range(2))
    arguments = [query, key, cos, sin]
    if draw(st.integers(0, 2)) == 0:
        which = draw(st.integers(0, 3))
        shape = draw(st.lists(st.integers(0, 5), max_size=5))
        other = draw_tensor(draw, shape, draw(st.sampled_from(DTYPES + OTHER_DTYPES)))
        arguments[which] = (
            draw(st.sampled_from([other, arguments[which].to("meta")])) if draw(st.booleans()) else draw(ODD)
        )
    return arguments


@SETTINGS
@given(arguments=rotations(), interleaved=mostly(st.booleans(), ODD))
def test_apply_rope_is_right_or_refused(arguments, interleaved):
    result = call(longattn.apply_rope, *arguments, interleaved=interleaved)
    if result is None:
        return
    *inputs, cos, sin = arguments
    dim, width = inputs[0].shape[-1], cos.shape[-1]
    if 2 * width > dim:
        pairs = slice(None, None, 2) if interleaved else slice(width // 2)
        cos, sin = cos[..., pairs], sin[..., pairs]
    half = cos.shape[-1]
    cos, sin = ((t if t.dim() == 2 else t[:, None]).double() for t in (cos, sin))
    for got, x in zip(result, inputs, strict=True):
        assert got.shape == x.shape and got.dtype == x.dtype
        if got.is_meta:
            continue
        first, second = (
            (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
        )
        expected = x.double()
        a, b = expected[..., first].clone(), expected[..., second].clone()
        expected = expected.clone()
        expected[..., first], expected[..., second] = a * cos - b * sin, b * cos + a * sin
        tolerance = {8: 1e-9, 4: 1e-5, 2: 0.1}[x.dtype.itemsize]
        assert torch.allclose(got.double(), expected, rtol=tolerance, atol=tolerance)


FACTORS = st.lists(st.floats(0.1, 10), min_size=4, max_size=4)
ROPE_VALUES = {
    "rope_theta": st.sampled_from([1e4, 500000, 1.0000000001, 1e300]),
    "factor": st.floats(1, 1e6),
    "original_max_position_embeddings": st.integers(2, 10**6),
    "partial_rotary_factor": st.sampled_from([0.25, 0.5, 1.0]),
    "beta_fast": st.floats(8, 64),
    "beta_slow": st.floats(0.5, 4),
    "attention_factor": st.floats(0.1, 4),
    "mscale": st.floats(-2, 2),
    "mscale_all_dim": st.floats(-2, 2),
    "low_freq_factor": st.floats(0.5, 2),
    "high_freq_factor": st.floats(2.5, 8),
    "truncate": st.booleans(),
    "alpha": st.floats(1, 1e3),
    "short_factor": FACTORS,
    "long_factor": FACTORS,
}
TYPES = ["default", "linear", "ntk", "dynamic", "by-parts", "yarn", "longrope", "llama3", "proportional", "su"]


@st.composite
def ropes(draw):
    """All keys of a type and some others, each of a value that fits; in every second dict one that may not."""
    rope = {key: draw(values) for key, values in ROPE_VALUES.items() if draw(st.integers(0, 9))}
    rope["rope_type"] = draw(st.sampled_from(TYPES))
    if draw(st.booleans()):
        key = draw(st.sampled_from([*rope, "unknown"]))
        rope[key] = draw(NUMBERS | st.sampled_from([5e-324, 1e308, 10**400, ["x"], {}]))
    return rope


@SETTINGS
@given(
    rope=ropes(),
    head_dim=mostly(st.just(8), st.sampled_from([2, 4, 7, 0, 2**16, 2**40, 10**30, True, 8.0])),
    length=mostly(st.integers(2, 10**6), st.none() | INTS | ODD),
    seq_len=mostly(st.none() | st.integers(1, 10**6), INTS | ODD),
)
def test_rope_frequencies_are_finite_or_refused(rope, head_dim, length, seq_len):
    result = call(longattn.rope_frequencies, rope, head_dim, max_position_embeddings=length, seq_len=seq_len)
    if result is not None:
        inv_freq, scaling = result
        assert inv_freq.dtype == torch.float64 and bool(inv_freq.isfinite().all()) and 0 < scaling < math.inf


@SETTINGS
@given(
    positions=st.one_of(
        st.builds(torch.arange, st.integers(0, 5)),
        st.lists(st.integers(-(2**62), 2**62), max_size=3).map(torch.tensor),
        st.lists(st.floats(-1e9, 1e9), max_size=3).map(torch.tensor),
        st.builds(torch.zeros, st.lists(st.integers(0, 3), max_size=3), dtype=st.sampled_from(DTYPES + OTHER_DTYPES)),
        ODD,
    ),
    inv_freq=st.one_of(
        st.lists(st.floats(0, 1), max_size=4).map(torch.tensor),
        st.builds(torch.ones, st.lists(st.integers(0, 3), max_size=3), dtype=st.sampled_from(DTYPES + OTHER_DTYPES)),
        ODD,
    ),
    scaling=mostly(st.floats(0.1, 4), NUMBERS),
    dtype=mostly(st.sampled_from(DTYPES), st.sampled_from([torch.int32, torch.bool, None, "float32"])),
)
def test_cos_and_sin_are_finite_or_refused(positions, inv_freq, scaling, dtype):
    result = call(longattn.rope_cos_sin, positions, inv_freq, scaling, dtype=dtype)
    if result is None:
        return
    for table, function in zip(result, (torch.cos, torch.sin), strict=True):
        assert table.shape == (*positions.shape, len(inv_freq)) and table.dtype == dtype
        exact = function(positions.double()[..., None] * inv_freq.double()) * float(scaling)
        assert torch.equal(table, exact.to(dtype))


@pytest.mark.parametrize("size", [2**60, 2**60 + 1, 2**63])
def test_windows_as_wide_as_positions_go_see_all_or_are_refused(size):
    query = torch.randn(1, 2, 9, 8)
    starts = torch.tensor([2], dtype=torch.int32)
    everything = longattn.window_attention(query, query, query, (-1, -1), kv_start=starts)
    result = call(longattn.window_attention, query, query, query, (size, size), kv_start=starts)
    assert (result is None) is (size > 2**60)
    assert result is None or torch.equal(result, everything)
