"""longattn.apply_rope_positions: equal to apply_rope on exact tables, on both paths, with gradients and compilation."""

import pytest
import torch

import longattn

PATHS = ["pure", "any"]
INV_FREQ = 10000.0 ** -(torch.arange(12, dtype=torch.float64) / 12)


def inputs(dtype=torch.float32, b=2, hq=4, hk=2, s=19, d=32):
    query = torch.randn(b, s, hq, d).transpose(1, 2).to(dtype)
    return query, torch.randn(b, hk, s, d).to(dtype), torch.randint(0, 10_000_000, (b, s))


def on(path, *args, **kwargs):
    if path == "any":
        return longattn.apply_rope_positions(*args, **kwargs)
    with longattn.force("pure"):
        return longattn.apply_rope_positions(*args, **kwargs)


def by_tables(query, key, positions, scaling=1.0, **kwargs):
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    cos, sin = longattn.rope_cos_sin(positions, INV_FREQ, scaling, dtype=dtype)
    return longattn.apply_rope(query, key, cos, sin, **kwargs)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_equals_apply_rope_on_exact_tables(dtype, interleaved, path):
    query, key, far = inputs(dtype)
    for positions in (far, far[:1], far[0], far[0].int()):
        out = on(path, query, key, positions, INV_FREQ, 1.5, interleaved=interleaved)
        expected = by_tables(query, key, positions, 1.5, interleaved=interleaved)
        for got, want in zip(out, expected, strict=True):
            assert got.dtype == dtype and got.stride() == want.stride()
            torch.testing.assert_close(
                got, want, rtol=1e-2 if dtype.itemsize == 2 else 1e-5, atol=1e-2 / 4**dtype.itemsize
            )


@pytest.mark.parametrize("path", PATHS)
def test_positions_of_packed_documents_count_from_their_start(path):
    query, key, _ = inputs(b=1, s=9)
    bounds = torch.tensor([0, 4, 4, 5, 9], dtype=torch.int32)
    positions = torch.tensor([0, 1, 2, 3, 0, 0, 1, 2, 3])
    packed = on(path, query, key, None, INV_FREQ, cu_seqlens=bounds)
    assert all(map(torch.equal, packed, on(path, query, key, positions, INV_FREQ)))


@pytest.mark.parametrize("path", PATHS)
def test_gradient_is_the_inverse_rotation(path):
    for documents in (None, torch.tensor([0, 7, 19], dtype=torch.int32)):
        query, key, positions = inputs(b=1)
        query.requires_grad_(), key.requires_grad_()
        where = positions if documents is None else None
        with longattn.force("pure") if path == "pure" else longattn.debug():
            outs = longattn.apply_rope_positions(query, key, where, INV_FREQ, 0.7, cu_seqlens=documents)
            incoming = [torch.randn_like(out) for out in outs]
            grads = torch.autograd.grad(outs, (query, key), incoming)
        place = positions if documents is None else torch.cat([torch.arange(7), torch.arange(12)])
        cos, sin = longattn.rope_cos_sin(place, INV_FREQ, 0.7)
        for got, want in zip(grads, longattn.apply_rope(*incoming, cos, -sin), strict=True):
            torch.testing.assert_close(got, want)


def test_gradcheck_and_double_backward():
    query, key, positions = inputs(torch.float64, b=1, s=3, d=24)
    query.requires_grad_(), key.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: longattn.apply_rope_positions(q, k, positions, INV_FREQ), (query, key))
    out, _ = longattn.apply_rope_positions(query, key, positions, INV_FREQ)
    (grad,) = torch.autograd.grad((out**2).sum(), query, create_graph=True)
    with pytest.raises(NotImplementedError, match="apply_rope_positions: double backward"):
        grad.sum().backward()


def test_opcheck():
    query, key, positions = inputs(b=1, s=5)
    bounds = torch.tensor([0, 2, 5], dtype=torch.int32)
    for where in ((positions, None), (None, bounds)):
        args = (query.clone().requires_grad_(), key.clone().requires_grad_(), *where, INV_FREQ, 1.0, False)
        torch.library.opcheck(torch.ops.longattn.apply_rope_positions.default, args)
        backward = (query, key, *where, INV_FREQ, 1.0, False, True, False)
        torch.library.opcheck(torch.ops.longattn.apply_rope_positions_bwd.default, backward)


def test_compile_makes_one_graph_for_all_lengths():
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(query, key, positions):
        query, key = longattn.apply_rope_positions(query, key, positions, INV_FREQ)
        return query.sum() + (key**2).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for s in (5, 8, 31):
        query, key, positions = inputs(s=s)
        query.requires_grad_()
        found = [torch.autograd.grad(run(query, key, positions), query)[0] for run in (compiled, step)]
        assert torch.equal(*found)
    assert len(graphs) == 1


def test_empty_inputs_give_empty_outputs():
    for shape in (dict(b=0), dict(hq=0), dict(s=0)):
        query, key, positions = inputs(**shape)
        assert longattn.apply_rope_positions(query, key, positions, INV_FREQ)[0].shape == query.shape
    none = longattn.apply_rope_positions(*inputs(), INV_FREQ[:0])
    assert none[0].shape[1] == 4


X = torch.zeros(2, 4, 5, 32)
BASE = dict(query=X, key=X[:, :2], positions=torch.arange(5), inv_freq=INV_FREQ)
BOUNDS = torch.tensor([0, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (dict(query=X[0]), ValueError, r"query must be \(B, H, S, D\)"),
        (dict(key=X[:, :, 1:]), ValueError, r"key must be \(2, H, 5, 32\)"),
        (dict(positions=None), ValueError, "positions or cu_seqlens must be given, and not both, got neither"),
        (dict(cu_seqlens=BOUNDS), ValueError, "got both"),
        (dict(positions=torch.arange(6)), ValueError, r"positions must be \(5,\) or \(2, 5\) .* got \(6,\)"),
        (dict(positions=torch.zeros(3, 5).int()), ValueError, r"positions must be .* got \(3, 5\)"),
        (
            dict(positions=torch.zeros(5)),
            TypeError,
            "positions must be a tensor of an integer dtype, got torch.float32",
        ),
        (dict(positions=[0, 1]), TypeError, "positions must be a tensor of an integer dtype, got list"),
        (dict(positions=None, cu_seqlens=BOUNDS), ValueError, "cu_seqlens needs batch size 1 .* got 2"),
        (
            dict(positions=None, cu_seqlens=BOUNDS.long()),
            TypeError,
            "cu_seqlens must be an int32 tensor, got torch.int64",
        ),
        (
            dict(positions=None, cu_seqlens=BOUNDS[:1]),
            ValueError,
            r"cu_seqlens must be \(documents \+ 1,\), got \(1,\)",
        ),
        (dict(inv_freq=torch.zeros(17)), ValueError, r"inv_freq must be .* at most head_dim 32, got \(17,\)"),
        (dict(inv_freq=torch.arange(3)), TypeError, "inv_freq must be a floating point tensor, got torch.int64"),
        (dict(inv_freq=torch.zeros(3, requires_grad=True)), ValueError, "inv_freq must not require grad"),
        (dict(attention_scaling="1"), TypeError, "attention_scaling must be a number, got '1'"),
        (dict(attention_scaling=float("nan")), ValueError, "attention_scaling must be finite, got nan"),
        (dict(interleaved=1), TypeError, "interleaved must be a bool, got 1"),
    ],
)
def test_wrong_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=f"^apply_rope_positions: .*{message}"):
        longattn.apply_rope_positions(**{**BASE, **changes})


def test_documents_must_fill_the_row():
    x = torch.zeros(1, 1, 5, 32)
    for bounds in ([0, 3], [1, 5], [0, 4, 3, 5]):
        with pytest.raises(ValueError, match="apply_rope_positions: cu_seqlens must rise from 0 to the 5 tokens"):
            longattn.apply_rope_positions(x, x, None, INV_FREQ, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
