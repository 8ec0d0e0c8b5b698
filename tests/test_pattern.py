"""The language of attention patterns: what it reads, writes and refuses."""

from __future__ import annotations

import pytest
import torch

from longattn.pattern import Pattern, parse_pattern, parse_patterns


@pytest.mark.parametrize(
    "text, pattern",
    [
        ("full", Pattern("full")),
        ("window:4096", Pattern("window", 4096)),
        (" window : 8 + sinks : 2 ", Pattern("window", 8, sinks=2)),
        ("group:10", Pattern("group", 10)),
        ("group:11+shift", Pattern("group", 11, shift=5)),
        ("group:10+shift:3+sinks:1", Pattern("group", 10, shift=3, sinks=1)),
        ("group:10+sinks:1+shift:3", Pattern("group", 10, shift=3, sinks=1)),
    ],
)
def test_pattern_reads_and_writes(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text, message",
    [
        ("windw:8", "pattern must be full, window:W, .*got 'windw:8'; did you mean 'window'"),
        ("Group:8", "got 'Group:8'; did you mean 'group'"),
        ("window", "pattern must be full, window:W"),
        ("full+sinks:2", "pattern must be full, window:W"),
        ("window:8+shift", "'shift' does not fit there"),
        ("window:8+sinks", "'sinks' does not fit there"),
        ("window:8+sinks:1+sinks:2", "'sinks:2' does not fit there"),
        ("window:0", "a window must hold at least 1 token, got 0"),
        ("window:-4", "expected a whole number >= 0, got '-4'"),
        ("window:4k", "expected a whole number >= 0, got '4k'"),
        ("group:8+shift:8", "shift must be below the group's 8 tokens, got 8"),
    ],
)
def test_pattern_refuses(text, message):
    with pytest.raises(ValueError, match=message):
        parse_pattern(text)


def test_patterns_cycle_or_list():
    assert [str(p) for p in parse_patterns("2 x window:8+sinks:1, 1 x full", 5)] == [
        "window:8+sinks:1",
        "window:8+sinks:1",
        "full",
        "window:8+sinks:1",
        "window:8+sinks:1",
    ]
    assert parse_patterns(["full", "group:4"], 2) == [Pattern("full"), Pattern("group", 4)]
    with pytest.raises(ValueError, match="one pattern a layer, 3 in all, got 2"):
        parse_patterns(["full", "full"], 3)
    with pytest.raises(ValueError, match="a count must be at least 1, got '0 x full'"):
        parse_patterns("0 x full", 3)
    with pytest.raises(ValueError, match="patterns separated by commas"):
        parse_patterns("full,", 3)


def test_attend_runs_the_pattern():
    q, k, v = (torch.randn(1, 2, 20, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    full = parse_pattern("full").attend(q, k, v)
    torch.testing.assert_close(full, torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(parse_pattern("window:20").attend(q, k, v), full)
    torch.testing.assert_close(parse_pattern("group:20").attend(q, k, v), full)
    assert not torch.allclose(parse_pattern("window:4+sinks:1").attend(q, k, v), full)
