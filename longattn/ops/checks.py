"""What the attention ops accept: every argument error, named by op, argument, expected and got."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from longattn.ops import dispatch
from longattn.ops.rows import Rows

__all__ = [
    "check_attention",
    "check_count",
    "check_row_values",
    "check_rows",
    "check_types",
    "is_int",
    "refuse_tangents",
]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_TOKENS = 2**60  # a position and a window, or a group and its shift, add up within int64
MAX_FACTOR = 1e30  # a scale or a soft cap: float32 holds it, its inverse, and its product with logits


def is_int(value: object) -> bool:
    """Whether `value` counts as an int argument (symbolic ones too, bools not)."""
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def check_count(op: str, name: str, count: object) -> None:
    """Check that a number of tokens is an int that positions can be added to."""
    if not is_int(count):
        raise TypeError(f"{op}: {name} must be an int, got {count!r}")
    if abs(count) > MAX_TOKENS:  # type: ignore[arg-type]
        raise ValueError(f"{op}: {name} must be at most 2^60 tokens, got {count}")


def check_types(op: str, tensors: dict[str, object], scale: object, softcap: object, sink_tokens: object) -> None:
    """Check what the schema of a torch op would refuse with an error of its own: query, key, value and options."""
    for name, x in tensors.items():
        needed = name in ("query", "key", "value")
        if not isinstance(x, Tensor) and (needed or x is not None):
            raise TypeError(f"{op}: {name} must be a tensor{'' if needed else ' or None'}, got {type(x).__name__}")
        if needed and x.dim() != 4:  # type: ignore[union-attr]
            raise ValueError(f"{op}: {name} must be (B, H, S, D), got shape {tuple(x.shape)}")  # type: ignore[union-attr]
    for name, number in (("scale", scale), ("softcap", softcap)):
        if isinstance(number, bool) or not isinstance(number, int | float | torch.SymInt | torch.SymFloat):
            raise TypeError(f"{op}: {name} must be a number, got {number!r}")
        if isinstance(number, int) and abs(number) > MAX_FACTOR:  # more than a float may hold
            raise ValueError(f"{op}: {name} must be a number from -1e30 to 1e30, got {number}")
    check_count(op, "sink_tokens", sink_tokens)


def refuse_tangents(op: str, *tensors: object) -> None:
    """Refuse what forward-mode differentiation gives: torch would call the kernels and drop the tangents silently."""
    if forward_ad._current_level < 0:  # what unpack_dual asks first, ten times as fast
        return
    for x in tensors:
        if isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None:
            raise NotImplementedError(f"{op}: forward-mode differentiation is not supported")


def check_attention(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float,
    sink_tokens: int,
    sink_logits: Tensor | None,
) -> None:
    """Check query (B, Hq, Sq, D), key and value (B, Hkv, Sk, D), and the options of the logits."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"{op}: {name} must be (B, H, S, D), got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            raise TypeError(f"{op}: {name} must be one of {allowed}, got {x.dtype}")
        if x.dtype != query.dtype:
            raise TypeError(f"{op}: {name} must have query's dtype {query.dtype}, got {x.dtype}")
        if x.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {x.device}")
        if x.shape[3] != query.shape[3]:
            raise ValueError(f"{op}: {name} must have head_dim {query.shape[3]} like query, got {x.shape[3]}")
        if x.shape[0] != query.shape[0]:
            raise ValueError(f"{op}: {name} must have batch size {query.shape[0]} like query, got {x.shape[0]}")
    for what, axis in (("heads", 1), ("keys", 2)):
        if value.shape[axis] != key.shape[axis]:
            raise ValueError(f"{op}: value must have {key.shape[axis]} {what} like key, got {value.shape[axis]}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if (kv_heads == 0 and heads != 0) or (kv_heads != 0 and heads % kv_heads):
        raise ValueError(f"{op}: query must have a multiple of key's {kv_heads} heads, got {heads}")
    if query.shape[3] < 1:
        raise ValueError(f"{op}: head_dim must be at least 1, got 0")
    if not abs(scale) <= MAX_FACTOR:
        raise ValueError(f"{op}: scale must be a number from -1e30 to 1e30, got {scale}")
    if not softcap >= 0:
        raise ValueError(f"{op}: softcap must be >= 0 (0 is off), got {softcap}")
    if softcap and not 1 / MAX_FACTOR <= softcap <= MAX_FACTOR:
        raise ValueError(f"{op}: softcap must be 0 (off) or from 1e-30 to 1e30, got {softcap}")
    if not is_int(sink_tokens) or sink_tokens < 0:
        raise ValueError(f"{op}: sink_tokens must be an int >= 0, got {sink_tokens!r}")
    if sink_logits is not None:
        if not isinstance(sink_logits, Tensor) or not sink_logits.dtype.is_floating_point:
            raise TypeError(
                f"{op}: sink_logits must be a float tensor, got {getattr(sink_logits, 'dtype', sink_logits)}"
            )
        if sink_logits.dim() != 1 or sink_logits.shape[0] != heads:
            raise ValueError(f"{op}: sink_logits must be ({heads},), one a query head, got {tuple(sink_logits.shape)}")
        if sink_logits.device != query.device:
            raise ValueError(f"{op}: sink_logits must be on query's device {query.device}, got {sink_logits.device}")


def check_rows(op: str, query: Tensor, key: Tensor, rows: Rows) -> None:
    """Check how the rows stand; values only of CPU tensors, or under `longattn.debug()`."""
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    placed = rows.query_start != num_keys - num_queries or rows.key_start != 0
    if not placed and num_queries > num_keys:
        raise ValueError(f"{op}: key must have at least query's {num_queries} tokens, got {num_keys}")
    if rows.query_start < 0 or rows.key_start < 0:
        raise ValueError(f"{op}: query_start and key_start must be >= 0, got {rows.query_start} and {rows.key_start}")
    for name, x, size in (
        ("cu_seqlens", rows.cu_seqlens, None),
        ("kv_start", rows.kv_start, batch),
        ("kv_end", rows.kv_end, batch),
    ):
        if x is None:
            continue
        if not isinstance(x, Tensor) or x.dtype != torch.int32:
            raise TypeError(f"{op}: {name} must be an int32 tensor, got {getattr(x, 'dtype', type(x).__name__)}")
        if x.dim() != 1 or (size is not None and x.shape[0] != size) or (size is None and x.shape[0] < 1):
            expected = f"({size},)" if size is not None else "(documents + 1,)"
            raise ValueError(f"{op}: {name} must be {expected}, got {tuple(x.shape)}")
        if x.device != query.device:
            raise ValueError(f"{op}: {name} must be on query's device {query.device}, got {x.device}")
    if rows.kv_end is not None and placed:
        raise ValueError(f"{op}: kv_end places the queries itself, so query_start must be {num_keys - num_queries}")
    if rows.cu_seqlens is not None:
        if rows.kv_start is not None or rows.kv_end is not None:
            raise ValueError(f"{op}: cu_seqlens can't be given together with kv_start or kv_end")
        if batch != 1:
            raise ValueError(f"{op}: cu_seqlens needs batch size 1 (documents packed in one row), got {batch}")
        if not placed and num_queries != num_keys:
            raise ValueError(f"{op}: cu_seqlens needs as many queries as keys, got {num_queries} and {num_keys}")


def check_row_values(op: str, query: Tensor, key: Tensor, rows: Rows) -> None:
    """Check the values of index tensors where they may be read: on the CPU, and anywhere under `longattn.debug()`."""
    if not rows.ragged or (query.device.type != "cpu" and not dispatch.debugging()):
        return
    last = rows.key_start + key.shape[2]
    for name, x in (("kv_start", rows.kv_start), ("kv_end", rows.kv_end)):
        if x is not None and len(x) and not (0 <= int(x.min()) and int(x.max()) <= last):
            raise ValueError(f"{op}: {name} must lie within 0 .. {last} (the keys), got {x.tolist()}")
    if rows.cu_seqlens is not None:
        bounds = rows.cu_seqlens.tolist()
        placed = rows.query_start != 0 or rows.key_start != 0 or query.shape[2] != key.shape[2]
        total = bounds[-1] if placed else key.shape[2]
        if bounds[0] != 0 or bounds[-1] != total or bounds != sorted(bounds):
            shown = bounds if len(bounds) <= 8 else f"{bounds[:4]} .. {bounds[-4:]}"
            raise ValueError(f"{op}: cu_seqlens must rise from 0 to the {total} tokens of the row, got {shown}")
