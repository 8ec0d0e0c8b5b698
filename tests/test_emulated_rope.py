"""The CUDA rotary kernel, compiled with g++ against the emulator: results and memory traffic."""

import ctypes

import pytest
import torch
from emulator.build import ROOT, load
from reference import assert_close

INT64, POINTER = ctypes.c_int64, ctypes.c_void_p
ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class RopeTensor(ctypes.Structure):
    _fields_ = [
        ("x", POINTER), ("out", POINTER), ("heads", INT64), ("x_stride", INT64 * 3), ("out_stride", INT64 * 3),
    ]  # fmt: skip


class RopePhases(ctypes.Structure):
    _fields_ = [
        ("inv_freq", POINTER), ("positions", POINTER), ("position_stride", INT64 * 2), ("cu_seqlens", POINTER),
        ("num_documents", ctypes.c_int32), ("scaling", ctypes.c_float),
    ]  # fmt: skip


class RopeParams(ctypes.Structure):
    _fields_ = [
        ("tensors", RopeTensor * 2), ("cos", POINTER), ("sin", POINTER), ("cos_stride", INT64 * 2),
        ("sin_stride", INT64 * 2), ("phases", RopePhases), ("batch", INT64), ("tokens", INT64), ("head_dim", INT64),
        ("half", INT64), ("element", ctypes.c_int32), ("interleaved", ctypes.c_bool), ("inverse", ctypes.c_bool),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = ROOT / "tests" / "emulator" / "rope_probe.cpp"
    return load(tmp_path_factory.mktemp("rope"), source, "-O1", "-DLONGATTN_EMULATED")


def rotate(library, query, key, cos, sin, interleaved=False, inverse=False, in_place=False):
    """(rotated query, rotated key, (bytes read, bytes written))."""
    strides = [(table.stride(0) if table.dim() == 3 else 0, table.stride(-2)) for table in (cos, sin)]
    tables = cos.data_ptr(), sin.data_ptr(), *strides, RopePhases()
    return launch(library, query, key, tables, cos.shape[-1], interleaved, inverse, in_place)


def rotate_at(library, query, key, positions, inv_freq, interleaved=False, inverse=False, scaling=1.0, documents=None):
    """As `rotate`, with phases formed in the kernel at int64 positions (S,) or (B, S), or in packed documents."""
    where, strides, packed = None, (0, 0), (None, 0)
    if documents is None:
        where, strides = (
            positions.data_ptr(),
            (positions.stride(0) if positions.dim() == 2 else 0, positions.stride(-1)),
        )
    else:
        packed = documents.data_ptr(), len(documents) - 1
    tables = None, None, (0, 0), (0, 0), RopePhases(inv_freq.data_ptr(), where, strides, *packed, scaling)
    return launch(library, query, key, tables, len(inv_freq), interleaved, inverse)


def launch(library, query, key, tables, half, interleaved, inverse, in_place=False):
    outs = [x if in_place else torch.empty_like(x) for x in (query, key)]
    tensors = [
        RopeTensor(x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3])
        for x, out in zip((query, key), outs, strict=True)
    ]
    params = RopeParams(
        (RopeTensor * 2)(*tensors), *tables, query.shape[0], query.shape[2], query.shape[3], half,
        ELEMENTS[query.dtype], interleaved, inverse,
    )  # fmt: skip
    moved = (INT64 * 2)()
    assert library.emulated_rope(ctypes.byref(params), moved) == 0
    return *outs, tuple(moved)


def expected(x, cos, sin, interleaved):
    """The rotation in float64."""
    x, half = x.double(), cos.shape[-1]
    cos, sin = (table.double() if table.dim() == 2 else table.double()[:, None] for table in (cos, sin))
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


def tables(half, tokens=5, batch=None):
    angle = torch.randn(*([] if batch is None else [batch]), tokens, half)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize(
    "head_dim,half", [(64, 32), (128, 32), (80, 40), (96, 24), (34, 17), (10, 3), (8, 0), (2600, 8)]
)
def test_rotation_is_right(library, head_dim, half, dtype, interleaved):
    query = torch.randn(2, 5, 3, head_dim).to(dtype).transpose(1, 2)
    key = torch.randn(2, 1, 5, head_dim).to(dtype)
    for batch in (None, 2):
        cos, sin = tables(half, batch=batch)
        out = rotate(library, query, key, cos, sin, interleaved)
        for got, x in zip(out, (query, key), strict=False):
            assert_close("out", got, expected(x, cos, sin, interleaved))
        back = rotate(library, *out[:2], cos, sin, interleaved, inverse=True)
        assert_close("inverse", back[0], query.double(), norm=2 * float(query.double().norm()))


def test_rotation_in_place_gives_the_same_bits(library):
    query, key = torch.randn(1, 4, 5, 64).bfloat16(), torch.randn(1, 2, 5, 64).bfloat16()
    cos, sin = tables(16)
    out = rotate(library, query, key, cos, sin)
    rotate(library, query, key, cos, sin, in_place=True)
    assert torch.equal(out[0], query) and torch.equal(out[1], key)


def test_rows_between_gaps_are_read_in_place(library):
    wide = torch.full((1, 5, 3, 75), torch.nan).bfloat16()
    query = wide[..., 1:67].transpose(1, 2)
    query.copy_(torch.randn(query.shape))
    cos, sin = tables(33)
    out = rotate(library, query, query, cos, sin)
    assert_close("out", out[0], expected(query, cos, sin, False))


def test_every_byte_moves_once(library):
    """All of query and key in and out, and the tables once a token for every 4 heads, in accesses of 16 bytes."""
    query, key = torch.randn(2, 8, 5, 128).bfloat16(), torch.randn(2, 2, 5, 128).bfloat16()
    cos, sin = tables(64)
    *_, (read, written) = rotate(library, query, key, cos, sin)
    both = 2 * (query.numel() + key.numel())
    assert written == both
    assert read == both + 2 * 5 * 64 * 4 * 2 * 3


def frequencies(half):
    return 10000.0 ** -(torch.arange(half, dtype=torch.float64) / max(half, 1))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", ELEMENTS)
@pytest.mark.parametrize("head_dim,half", [(64, 32), (80, 40), (96, 24), (34, 17), (10, 3), (2600, 8)])
def test_phases_formed_in_the_kernel_are_right(library, head_dim, half, dtype, interleaved):
    query = torch.randn(2, 5, 3, head_dim).to(dtype).transpose(1, 2)
    key, inv_freq = torch.randn(2, 1, 5, head_dim).to(dtype), frequencies(half)
    far = torch.randint(0, 10_000_001, (2, 5))
    documents = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    inside = torch.tensor([0, 1, 0, 1, 2])
    for positions, given in (
        (far[0], None),
        (far, None),
        (far.flip(0)[:, ::2].repeat(1, 2)[:, :5], None),
        (inside, documents),
    ):
        angle = positions.double()[..., None] * inv_freq
        out = rotate_at(library, query, key, positions, inv_freq, interleaved, scaling=1.25, documents=given)
        for got, x in zip(out, (query, key), strict=False):
            assert_close("out", got, expected(x, 1.25 * angle.cos(), 1.25 * angle.sin(), interleaved))
        back = rotate_at(
            library, *out[:2], positions, inv_freq, interleaved, inverse=True, scaling=0.8, documents=given
        )
        assert_close("inverse", back[0], query.double(), norm=2 * float(query.double().norm()))


def cos_sin_at(library, positions, inv_freq):
    cos, sin = torch.empty(len(positions)), torch.empty(len(positions))
    arguments = (positions, inv_freq, len(positions), cos, sin)
    library.emulated_cos_sin(*(POINTER(x.data_ptr()) if isinstance(x, torch.Tensor) else INT64(x) for x in arguments))
    return cos, sin


def test_phases_are_right_to_float32_at_ten_million(library):
    """Within 7.2e-8 of the true values (half an ulp below 1 is 3e-8), which a float32 phase misses by radians."""
    generator = torch.Generator().manual_seed(0)
    for most in (10, 1000, 10_000_000):
        positions = torch.randint(-most, most + 1, (100_000,), generator=generator)
        inv_freq = 1e6 ** -torch.rand(len(positions), generator=generator, dtype=torch.float64)
        phase = positions.double() * inv_freq  # its own rounding is 1e-9 at most
        cos, sin = cos_sin_at(library, positions, inv_freq)
        for got, true in ((cos, phase.cos()), (sin, phase.sin())):
            assert float((got.double() - true).abs().max()) < 7.2e-8
    small = phase.abs() < 0.7  # no cancellation in the reference: relative too
    assert bool(((sin.double() - phase.sin()).abs() <= 1.2e-7 * phase.sin().abs())[small].all())


def test_every_frequency_has_a_phase(library):
    """Whole turns at any size, eighths of a turn exactly where the quarter changes, and no number for no frequency."""
    frequency = torch.tensor([0.0, 5e-324, 1.0, 3.5, 1e4, 1e9, -0.25, torch.inf, torch.nan], dtype=torch.float64)
    cos, sin = cos_sin_at(library, torch.ones(len(frequency), dtype=torch.int64), frequency)
    assert torch.allclose(cos[:7].double(), frequency[:7].cos(), rtol=0, atol=7e-8)
    assert torch.allclose(sin[:7].double(), frequency[:7].sin(), rtol=0, atol=7e-8)
    assert bool(cos[7:].isnan().all()) and bool(sin[7:].isnan().all())
    eighth = torch.tensor([torch.pi / 4], dtype=torch.float64)
    for turns in range(-8, 9):
        cos, sin = cos_sin_at(library, torch.tensor([turns]), eighth)
        assert abs(float(cos) ** 2 + float(sin) ** 2 - 1) < 3e-7
        assert abs(float(cos) - float((turns * eighth).cos())) < 7e-8


def test_no_table_is_read_where_phases_are_formed(library):
    query, key = torch.randn(2, 8, 5, 128).bfloat16(), torch.randn(2, 2, 5, 128).bfloat16()
    *_, (read, written) = rotate_at(library, query, key, torch.arange(5), frequencies(64))
    assert read == written == 2 * (query.numel() + key.numel())


def test_no_bound_of_a_document_leads_outside(library):
    query = torch.randn(1, 2, 5, 64)
    for bounds in ([-(2**31), 2**31 - 1, 3], [7, -5, -5, 2], [9, 9]):
        documents = torch.tensor(bounds, dtype=torch.int32)
        out = rotate_at(library, query, query, None, frequencies(32), documents=documents)
        assert bool(out[0].isfinite().all())
