"""What is measured: shapes, patterns and dtypes, the default list, and the ratios the project aims at."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from longattn.pattern import Pattern, parse_pattern

__all__ = ["DTYPES", "GOALS", "QUICK_SHAPES", "SHAPES", "Case", "Goal", "parse_case"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
SHAPES = ("B1 H8 S4096 D64 W512", "B1 H8 S4096 D128 W512", "B1 H8 S4096 D64 W128", "B1 H8 S4096 D64 G512+shift")
QUICK_SHAPES = ("B1 H4 S1024 D64 W128", "B1 H4 S1024 D64 G128+shift")
_SIZE = re.compile(r"^([BHKQSD])(\d+)$")
_PATTERN = {"W": "window:", "G": "group:"}


@dataclass(frozen=True)
class Case:
    """One shape, pattern and dtype: query (batch, heads, queries, head_dim), key and value with kv_heads and tokens.

    The queries are the last of the tokens; `None` is all of them.
    """

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int
    pattern: Pattern
    dtype: torch.dtype
    queries: int | None = None
    device: str = "cpu"

    @property
    def num_queries(self) -> int:
        return self.tokens if self.queries is None else self.queries

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def shape(self) -> str:
        """The text that `parse_case` reads."""
        kv = "" if self.kv_heads == self.heads else f" K{self.kv_heads}"
        queries = "" if self.queries is None else f" Q{self.queries}"
        kind, _, rest = str(self.pattern).partition(":")
        pattern = "full" if kind == "full" else kind[0].upper() + rest
        return f"B{self.batch} H{self.heads}{kv}{queries} S{self.tokens} D{self.head_dim} {pattern}"

    @property
    def flops(self) -> float:
        """Operations of the forward's two products over the visible area; the backward's five are 2.5 times that."""
        visible = self.pattern.visible(self.tokens) - self.pattern.visible(self.tokens - self.num_queries)
        return 4.0 * self.batch * self.heads * self.head_dim * visible

    @property
    def output_bytes(self) -> int:
        return self.batch * self.heads * self.num_queries * self.head_dim * self.dtype.itemsize

    @property
    def grad_bytes(self) -> int:
        """Of the three gradients, and of the three inputs."""
        kv_bytes = self.batch * self.kv_heads * self.tokens * self.head_dim * self.dtype.itemsize
        return self.output_bytes + 2 * kv_bytes

    def seeing(self, pattern: Pattern) -> Case:
        return replace(self, pattern=pattern)

    def inputs(self, seed: int = 0, *, token_major: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normal query, key, value and gradient of the output, the same for every pattern of a shape.

        In (B, S, H, D) memory if `token_major`, as models hold them.
        """
        generator = torch.Generator(self.device).manual_seed(seed)
        shared = (self.kv_heads, self.tokens)
        shapes = ((self.heads, self.num_queries), shared, shared, (self.heads, self.num_queries))
        made = []
        for heads, tokens in shapes:
            shape = (self.batch, tokens, heads) if token_major else (self.batch, heads, tokens)
            x = torch.randn(*shape, self.head_dim, generator=generator, device=self.device).to(self.dtype)
            made.append(x.transpose(1, 2) if token_major else x)
        return made[0], made[1], made[2], made[3]


@dataclass(frozen=True)
class Goal:
    """How many times longer than longattn a peer should take, at least."""

    shape: str
    dtype: str
    work: str
    peer: str
    ratio: float


GOALS = (
    Goal(SHAPES[0], "float32", "forward", "flex attention", 2.5),
    Goal(SHAPES[0], "bfloat16", "forward", "flex attention", 6.8),
    Goal(SHAPES[0], "float32", "forward+backward", "sdpa, dense mask", 10.0),
    Goal(SHAPES[0], "bfloat16", "forward+backward", "sdpa, dense mask", 16.0),
    Goal(SHAPES[1], "float32", "forward", "flex attention", 2.1),
    Goal(SHAPES[1], "bfloat16", "forward", "flex attention", 5.8),
)


def parse_case(shape: str, dtype: str = "float32") -> Case:
    """Read a case: `B1 H8 K2 S4096 D64 W512`, with K (key/value heads) as H where absent, and Q (queries) as S.

    Args:
        shape: B, H, S and D with their sizes, and W512 (a window), G512, G512+shift (groups) or full.
        dtype: one of DTYPES.

    Raises:
        ValueError: a size is missing, repeated or not understood.

    Example:
        >>> parse_case("B1 H8 S4096 D64 W512").pattern
        Pattern(kind='window', size=512, shift=0, sinks=0)
    """
    if dtype not in DTYPES:
        raise ValueError(f"bench: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    sizes: dict[str, int] = {}
    pattern: Pattern | None = None
    for word in shape.split():
        match = _SIZE.match(word)
        repeated = (match is not None and match[1] in sizes) or (match is None and pattern is not None)
        if repeated:
            raise ValueError(f"bench: shape {shape!r} gives {word[0]} twice")
        if match is not None:
            sizes[match[1]] = int(match[2])
            continue
        pattern = parse_pattern(_PATTERN[word[0]] + word[1:] if word[0] in _PATTERN else word)
    missing = [name for name in "BHSD" if sizes.get(name, 0) < 1]
    if missing or pattern is None:
        wanted = ", ".join(missing + ([] if pattern else ["a pattern"]))
        raise ValueError(f"bench: shape must look like {SHAPES[0]!r} with sizes above 0, {wanted} missing in {shape!r}")
    if sizes["H"] % sizes.setdefault("K", sizes["H"]):
        raise ValueError(f"bench: H must be a multiple of K, got {shape!r}")
    queries = sizes.get("Q")
    if queries is not None and not 1 <= queries <= sizes["S"]:
        raise ValueError(f"bench: Q must lie between 1 and S, got {shape!r}")
    return Case(sizes["B"], sizes["H"], sizes["K"], sizes["S"], sizes["D"], pattern, DTYPES[dtype], queries)
