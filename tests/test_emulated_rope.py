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


class RopeParams(ctypes.Structure):
    _fields_ = [
        ("tensors", RopeTensor * 2), ("cos", POINTER), ("sin", POINTER), ("cos_stride", INT64 * 2),
        ("sin_stride", INT64 * 2), ("batch", INT64), ("tokens", INT64), ("head_dim", INT64), ("half", INT64),
        ("element", ctypes.c_int32), ("interleaved", ctypes.c_bool), ("inverse", ctypes.c_bool),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    source = ROOT / "tests" / "emulator" / "rope_probe.cpp"
    return load(tmp_path_factory.mktemp("rope"), source, "-O1", "-DLONGATTN_EMULATED")


def rotate(library, query, key, cos, sin, interleaved=False, inverse=False, in_place=False):
    """(rotated query, rotated key, (bytes read, bytes written))."""
    outs = [x if in_place else torch.empty_like(x) for x in (query, key)]
    tensors = [
        RopeTensor(x.data_ptr(), out.data_ptr(), x.shape[1], x.stride()[:3], out.stride()[:3])
        for x, out in zip((query, key), outs, strict=True)
    ]
    strides = [(table.stride(0) if table.dim() == 3 else 0, table.stride(-2)) for table in (cos, sin)]
    params = RopeParams(
        (RopeTensor * 2)(*tensors), cos.data_ptr(), sin.data_ptr(), *strides, query.shape[0], query.shape[2],
        query.shape[3], cos.shape[-1], ELEMENTS[query.dtype], interleaved, inverse,
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
