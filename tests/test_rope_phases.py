"""Rotary phases: exactness at long positions, shapes, types, and tracing."""

import mpmath
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from longattn.rope import rope_cos_sin, rope_frequencies

THETA = 10_000.0


def test_cos_sin_are_right_to_float32_at_ten_million():
    inv_freq, _ = rope_frequencies({"rope_theta": 500_000.0}, 128)
    positions = torch.tensor([0, 1, 131_071, 1_048_577, 9_999_991, 10_000_000, 16_777_217])
    cos, sin = rope_cos_sin(positions, inv_freq)
    assert cos.dtype == sin.dtype == torch.float32
    with mpmath.workdps(50):
        theta = mpmath.mpf(500_000)
        for row, position in enumerate(positions.tolist()):
            for index in range(64):
                phase = position * theta ** (-mpmath.mpf(2 * index) / 128)
                # half a float32 step at 1, and what the float64 phase itself can be off
                bound = 2.0**-25 + 4 * position * 2.0**-53
                assert abs(cos[row, index].item() - mpmath.cos(phase)) <= bound
                assert abs(sin[row, index].item() - mpmath.sin(phase)) <= bound


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float64])
def test_cos_sin_take_positions_of_any_number_type(dtype):
    inv_freq, _ = rope_frequencies({"rope_theta": THETA}, 16)
    positions = torch.tensor([[0, 3, 200], [7, 1, 2]])
    cos, sin = rope_cos_sin(positions.to(dtype), inv_freq)
    expected = rope_cos_sin(positions, inv_freq)
    assert cos.shape == sin.shape == (2, 3, 8)
    assert torch.equal(cos, expected[0]) and torch.equal(sin, expected[1])


def test_cos_sin_round_once():
    inv_freq, _ = rope_frequencies({"rope_theta": THETA}, 64)
    positions = torch.arange(1000)
    exact = (positions.double()[:, None] * inv_freq).cos() * 1.3
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(rope_cos_sin(positions, inv_freq, 1.3, dtype=dtype)[0], exact.to(dtype))


def test_cos_sin_have_shapes_without_values():
    inv_freq = torch.empty(8, dtype=torch.float64, device="meta")
    cos, sin = rope_cos_sin(torch.empty(3, 2, 5, dtype=torch.long, device="meta"), inv_freq)
    assert cos.shape == sin.shape == (3, 2, 5, 8)
    assert rope_cos_sin(torch.arange(0), torch.ones(4))[0].shape == (0, 4)


def test_cos_sin_compile_whole_and_once_for_all_lengths():
    inv_freq, _ = rope_frequencies({"rope_theta": THETA}, 16)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(rope_cos_sin, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for length in (5, 9, 17):
        for mine, eager in zip(
            compiled(torch.arange(length), inv_freq), rope_cos_sin(torch.arange(length), inv_freq), strict=True
        ):
            assert torch.equal(mine, eager)
        counts.append(graphs.frame_count)
    assert counts[0] == counts[-1], counts  # older torch compiles the first anew, the float then a symbol


SCALED = dict(rope_theta=THETA, factor=4.0, original_max_position_embeddings=32)
LISTS = dict(short_factor=[1.0] * 4, long_factor=[2.0] * 4)
TABLES = [
    dict(rope_theta=THETA),
    *(dict(rope_type=kind, rope_theta=THETA, factor=4.0) for kind in ("linear", "ntk", "dynamic", "proportional")),
    *(dict(rope_type=kind, **SCALED) for kind in ("yarn", "by-parts")),
    dict(rope_type="longrope", **SCALED, **LISTS),
    dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, **SCALED),
]


@pytest.mark.parametrize("rope", TABLES, ids=lambda rope: rope.get("rope_type", "default"))
def test_frequencies_compile_whole_for_all_lengths(rope):
    def turned(x, length):
        inv_freq, scaling = rope_frequencies(rope, 8, max_position_embeddings=128, seq_len=length)
        return x * inv_freq * scaling

    torch._dynamo.reset()  # the types share code, and its limit of compilations
    compiled = torch.compile(turned, fullgraph=True, backend="eager")
    x = torch.ones(4, dtype=torch.float64)
    for length in (100, 256, 1000):
        assert torch.equal(compiled(x, length), turned(x, length))


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="longrope", **SCALED, **{**LISTS, "short_factor": [1.0, 5e-324, 1.0, 1.0]}),
        dict(rope_type="dynamic", rope_theta=THETA, factor=4.0, alpha=5e-324),
        dict(rope_type="dynamic", rope_theta=1.5, factor=1.0, alpha=1e-320),
        dict(rope_type="yarn", **SCALED, mscale=1.0, mscale_all_dim=-1e308),
    ],
)
def test_frequencies_that_are_not_finite_are_refused(rope):
    with pytest.raises(ValueError, match="must give finite frequencies and a positive factor of cos and sin"):
        rope_frequencies(rope, 8)


def test_cos_sin_refuse_what_they_cannot_serve():
    inv_freq, positions = torch.ones(4, dtype=torch.float64), torch.arange(3)
    with pytest.raises(TypeError, match="positions must be integer or floating point, got torch.bool"):
        rope_cos_sin(positions > 1, inv_freq)
    with pytest.raises(TypeError, match="inv_freq must be floating point, got torch.int64"):
        rope_cos_sin(positions, positions)
    with pytest.raises(ValueError, match=r"inv_freq must have shape \(rotary_dim / 2,\), got \(1, 4\)"):
        rope_cos_sin(positions, inv_freq[None])
    with pytest.raises(ValueError, match="on the device of positions, meta, got cpu"):
        rope_cos_sin(positions.to("meta"), inv_freq)
    with pytest.raises(TypeError, match="dtype must be floating point, got torch.int64"):
        rope_cos_sin(positions, inv_freq, dtype=torch.int64)
