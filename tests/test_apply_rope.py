"""longattn.apply_rope against a float64 rotation of complex numbers, on both paths."""

import pytest
import torch
from torch import Tensor

import longattn

FLOOR = {torch.float64: 1e-14, torch.float32: 2e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}
PATHS = ["pure", "any"]


def rotated(x: Tensor, angle: Tensor, interleaved: bool) -> Tensor:
    """x (B, H, S, D) rotated by angle (S, w) or (B, S, w), in float64, as complex numbers."""
    x, half = x.double(), angle.shape[-1]
    angle = angle if angle.dim() == 2 else angle[:, None]
    turn = torch.polar(torch.ones_like(angle), angle)
    if interleaved:
        pairs = x[..., : 2 * half].unflatten(-1, (half, 2)).contiguous()
        head = torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
    else:
        spun = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * turn
        head = torch.cat((spun.real, spun.imag), -1)
    return torch.cat((head, x[..., 2 * half :]), -1)


def assert_close(got: Tensor, expected: Tensor) -> None:
    error = (got.double() - expected).norm()
    assert error <= FLOOR[got.dtype] * expected.norm(), f"{float(error)} of {float(expected.norm())}"


def run(path: str, *args: Tensor, interleaved: bool = False) -> tuple[Tensor, Tensor]:
    if path == "any":
        return longattn.apply_rope(*args, interleaved=interleaved)
    with longattn.force("pure"):
        return longattn.apply_rope(*args, interleaved=interleaved)


def inputs(dtype=torch.float32, b=2, hq=4, hk=2, s=19, d=32, half=16, rows=None):
    query, key = torch.randn(b, s, hq, d).transpose(1, 2).to(dtype), torch.randn(b, hk, s, d).to(dtype)
    angle = 20 * torch.randn(*(() if rows is None else (rows,)), s, half, dtype=torch.float64)
    return query, key, angle


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOOR)
def test_rotation_equals_complex_product(dtype, interleaved, path):
    query, key, angle = inputs(dtype, rows=2)
    tables = torch.float64 if dtype == torch.float64 else torch.float32
    outs = run(path, query, key, angle.cos().to(tables), angle.sin().to(tables), interleaved=interleaved)
    for out, x in zip(outs, (query, key), strict=True):
        assert out.dtype == dtype
        assert_close(out, rotated(x, angle, interleaved))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [dict(s=1), dict(s=37, d=20, half=3), dict(d=2, half=1), dict(b=1, hq=1, hk=1, s=300)]
)
@pytest.mark.parametrize("rows", [None, 1])
def test_rotation_of_any_shape(shape, rows, interleaved, path):
    query, key, angle = inputs(rows=rows, **shape)
    outs = run(path, query, key, angle.cos().float(), angle.sin().float(), interleaved=interleaved)
    for out, x in zip(outs, (query, key), strict=True):
        assert_close(out, rotated(x, angle, interleaved))
        assert torch.equal(out[..., 2 * angle.shape[-1] :], x[..., 2 * angle.shape[-1] :])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_full_width_tables_equal_half_width(interleaved, path):
    query, key, angle = inputs(rows=2)
    cos, sin = angle.cos().float(), angle.sin().float()
    twice = (lambda t: t.repeat_interleave(2, -1)) if interleaved else (lambda t: torch.cat((t, t), -1))
    narrow = run(path, query, key, cos, sin, interleaved=interleaved)
    wide = run(path, query, key, twice(cos), twice(sin), interleaved=interleaved)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_low_precision_is_rounded_once(path):
    query, key, angle = inputs(torch.bfloat16)
    cos, sin = angle.cos().float(), angle.sin().float()
    out, _ = run(path, query, key, cos, sin)
    single, _ = run(path, query.float(), key.float(), cos, sin)
    # A fused multiply-add may move a float32 across a rounding border: a few may differ; with two roundings many do.
    assert (out != single.bfloat16()).double().mean() < 1e-3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_inf_stay_in_their_pair(dtype, path):
    x = torch.ones(1, 1, 2, 8, dtype=dtype)
    x[0, 0, 0, 1], x[0, 0, 1, 2] = float("nan"), float("inf")
    table = torch.full((2, 4), 0.5)
    out, _ = run(path, x, x, table, table)
    assert out.isnan().nonzero().tolist() == [[0, 0, 0, 1], [0, 0, 0, 5]]
    assert out.isinf().nonzero().tolist() == [[0, 0, 1, 2], [0, 0, 1, 6]]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("empty", ["b", "hq", "s"])
def test_empty_dims_give_empty_outputs(empty, path):
    query, key, angle = inputs(**{empty: 0})
    out, _ = run(path, query.requires_grad_(), key, angle.cos().float(), angle.sin().float())
    assert out.shape == query.shape
    out.sum().backward()


def test_outputs_and_gradients_take_the_inputs_order_of_strides():
    query, key, angle = inputs()
    wide = torch.randn(2, 19, 4, 40).transpose(1, 2)[..., :32]  # gaps between rows
    for x, expected in ((query, query.stride()), (key, key.stride()), (wide, query.stride())):
        x = x.detach().requires_grad_()
        for place, args in enumerate([(x, key), (query, x)]):
            out = longattn.apply_rope(*args, angle.cos().float(), angle.sin().float())[place]
            assert out.stride() == expected
            (grad,) = torch.autograd.grad(out.sum(), x)
            assert grad.stride() == expected


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_is_the_inverse_rotation(interleaved, path):
    query, key, angle = inputs(rows=2, half=12)
    query.requires_grad_()
    out, _ = run(path, query, key, angle.cos().float(), angle.sin().float(), interleaved=interleaved)
    incoming = torch.randn(out.shape)
    if path == "pure":
        with longattn.force("pure"):
            out.backward(incoming)
    else:
        out.backward(incoming)
    assert_close(query.grad, rotated(incoming, -angle, interleaved))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    query, key, angle = inputs(torch.float64, s=3, d=6, half=2)
    query.requires_grad_(), key.requires_grad_()
    function = lambda q, k: longattn.apply_rope(q, k, angle.cos(), angle.sin(), interleaved=interleaved)  # noqa: E731
    assert torch.autograd.gradcheck(function, (query, key))


def test_double_backward_names_the_op():
    query, key, angle = inputs()
    query.requires_grad_()
    out, _ = longattn.apply_rope(query, key, angle.cos().float(), angle.sin().float())
    (grad,) = torch.autograd.grad((out**2).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="apply_rope: double backward"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_opcheck(dtype):
    query, key, angle = inputs(dtype, s=5)
    tables = angle.cos().to(dtype), angle.sin().to(dtype)
    args = (query.clone().requires_grad_(), key.clone().requires_grad_(), *tables, False)
    torch.library.opcheck(torch.ops.longattn.apply_rope.default, args)
    torch.library.opcheck(torch.ops.longattn.apply_rope_bwd.default, (query, key, *tables, False, True, False))


def test_compile_makes_one_graph_for_all_lengths():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(query, key, cos, sin):
        query, key = longattn.apply_rope(query, key, cos, sin)
        return query.sum() + (key**2).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for s in (5, 8, 31):
        query, key, angle = inputs(s=s)
        query.requires_grad_()
        args = query, key, angle.cos().float(), angle.sin().float()
        (grad,) = torch.autograd.grad(compiled(*args), query)
        (expected,) = torch.autograd.grad(step(*args), query)
        assert torch.equal(grad, expected)
    assert len(graphs) == 1


def test_compile_with_aot_autograd_equals_eager():
    query, key, angle = inputs(s=6)
    query.requires_grad_()
    args = query, key, angle.cos().float(), angle.sin().float()
    compiled = torch.compile(longattn.apply_rope, fullgraph=True, backend="aot_eager")
    expected, got = longattn.apply_rope(*args), compiled(*args)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(expected, got, strict=True))
    grads = [torch.autograd.grad(out[0].square().sum(), query)[0] for out in (expected, got)]
    assert torch.equal(*grads)


def test_the_torch_op_refuses_tables_that_require_grad():
    query, key, angle = inputs()
    with pytest.raises(ValueError, match="apply_rope: cos and sin must not require grad"):
        torch.ops.longattn.apply_rope(query, key, angle.cos().float().requires_grad_(), angle.sin().float(), False)


def test_autocast_changes_nothing():
    query, key, angle = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = longattn.apply_rope(query, key, angle.cos().float(), angle.sin().float())
    assert out.dtype == torch.float32


BASE = dict(query=torch.zeros(2, 4, 5, 8), key=torch.zeros(2, 2, 5, 8), cos=torch.zeros(5, 4), sin=torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(query=torch.zeros(5, 8)), ValueError, r"query must be \(B, H, S, D\), got shape \(5, 8\)"),
        (dict(query=None), TypeError, "query must be a tensor, got NoneType"),
        (dict(query=torch.zeros(2, 4, 5, 8, dtype=torch.int32)), TypeError, "query must be one of float64, .*int32"),
        (dict(key=torch.zeros(2, 2, 6, 8)), ValueError, r"key must be \(2, H, 5, 8\) .* got \(2, 2, 6, 8\)"),
        (dict(key=BASE["key"].double()), TypeError, "key must have query's dtype torch.float32, got torch.float64"),
        (dict(key=BASE["key"].to("meta")), ValueError, "key must be on query's device cpu, got meta"),
        (dict(cos=torch.zeros(6, 4)), ValueError, r"cos must be \(5, w\) or \(2, 5, w\) .* got \(6, 4\)"),
        (dict(cos=torch.zeros(3, 5, 4)), ValueError, r"cos must be .* got \(3, 5, 4\)"),
        (dict(cos=torch.zeros(5, 9)), ValueError, "cos must be at most head_dim 8 wide, got 9"),
        (dict(cos=torch.zeros(5, 7)), ValueError, "holds each angle twice, got odd width 7"),
        (dict(sin=torch.zeros(5, 2)), ValueError, r"sin must have cos's shape \(5, 4\), got \(5, 2\)"),
        (dict(sin=torch.zeros(5, 4, dtype=torch.int64)), TypeError, "sin must have a float dtype, got torch.int64"),
        (dict(sin=torch.zeros(5, 4, requires_grad=True)), ValueError, "sin must not require grad .* pass sin.detach"),
        (dict(interleaved=1), TypeError, "interleaved must be a bool, got 1"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^apply_rope: .*{message}"):
        longattn.apply_rope(**{**BASE, **changes})
