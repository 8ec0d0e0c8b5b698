"""What goes wrong on one rank is an error on all of them, and never a wrong gradient."""

from __future__ import annotations

import distributed_misuse as misuse
import pytest
import torch
from distributed_ranks import RankError, Ranks

WINDOW = dict(window_size=4)
DIFFERENT = {
    "window_size": (WINDOW, dict(window_size=5)),
    "group_size": (dict(group_size=4), dict(group_size=6)),
    "shift": (dict(group_size=4), dict(group_size=4, shift=2)),
    "sink_tokens": (WINDOW, dict(sink_tokens=2)),
    "softcap": (WINDOW, dict(softcap=3.0)),
    "scale": (WINDOW, dict(scale=0.5)),
    "dtype": (WINDOW, dict(dtype=torch.float64)),
    "offsets": (WINDOW, dict(tokens=9)),
    "cu_seqlens": (
        dict(window_size=4, cu_seqlens=torch.tensor([0, 5, 16], dtype=torch.int32)),
        dict(cu_seqlens=torch.tensor([0, 6, 16], dtype=torch.int32)),
    ),
}
REFUSED = {
    "window_size must hold at least 1 key": dict(window_size=0),
    "window_size must be an int": dict(window_size="4"),
    "offsets must be 3 positions for 2 ranks": dict(offsets=[0, 16]),
    "query must have the shard's 9 tokens": dict(offsets=[0, 7, 16]),
    "cu_seqlens must be borders in the whole sequence": dict(cu_seqlens=torch.tensor([0, 8], dtype=torch.int32)),
    "cu_seqlens must be an int32 tensor": dict(cu_seqlens=torch.tensor([0, 16])),
    "kv_start can't be given together with sink_tokens": dict(
        kv_start=torch.tensor([0], dtype=torch.int32), sink_tokens=1
    ),
    "softcap must be >= 0": dict(softcap=-1.0),
    "offsets must be a list of ints": dict(offsets="0, 8, 16"),
    "cu_seqlens must be a tensor or None": dict(cu_seqlens=[0, 16]),
    "position_ids must be (1 or B, 8), got (1, 7)": dict(position_ids=torch.arange(7)[None]),
    "8 to 15 on this rank, got 0 to 7; shard_batch": dict(position_ids=torch.arange(8)[None]),
    "8 to 15 on this rank, got 4 to 11; shard_batch": dict(position_ids=torch.tensor([[*range(4, 8), *range(8, 12)]])),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_arguments_that_differ_are_an_error_on_every_rank(gloo, name):
    heard = gloo.run(2, misuse.on_rank_1, *DIFFERENT[name])
    assert len(set(heard)) == 1 and name in heard[0], heard
    assert "all ranks must be given the same" in heard[0] and "on rank 1" in heard[0]


@pytest.mark.parametrize("text", REFUSED)
def test_arguments_that_one_rank_refuses_are_an_error_on_every_rank(gloo, text):
    heard = gloo.run(2, misuse.on_rank_1, dict(window_size=7), REFUSED[text])
    assert all(text in one for one in heard), heard
    assert "rank 1 of the group refused its arguments" in heard[0]


def test_different_functions_are_an_error_on_every_rank(gloo):
    heard = gloo.run(2, misuse.on_rank_1, WINDOW, dict(window_size=None, group_size=4))
    assert all("all ranks must be given the same function, got window_attention" in one for one in heard), heard


@pytest.mark.parametrize("how", ["skips", "skips backward", "is killed", "is killed in backward"])
def test_a_rank_that_leaves_ends_the_others_with_a_message(how):
    ranks = Ranks(2)
    try:
        answers = dict(enumerate(ranks.run(2, misuse.some_leave, how)))
    except RankError as error:
        assert "killed" in how and error.errors == {1: "the process ended"}, error
        answers = error.answers
    finally:
        ranks.stop()
    assert "RuntimeError: window_attention: not every rank of the group made this call" in answers[0], answers


def test_devices_compare_new_signatures_through_the_store(gloo):
    for heard in gloo.run(2, misuse.by_store):
        assert heard[:2] == ["agreed", "agreed"]
        assert "all ranks must be given the same window, got 5 on rank 0 and 6 on rank 1" in heard[2]


def test_calls_that_went_well_before_and_are_mixed_up_are_an_error_on_every_rank(gloo):
    for heard in gloo.run(2, misuse.some_leave, "another known call"):
        assert "all ranks must be given the same window_size (tokens before), got 3 on rank 0 and 5 on rank 1" in heard


def test_a_rank_that_skipped_a_call_is_told_so(gloo):
    for heard in gloo.run(2, misuse.skips_one):
        assert "all ranks must be given the same number of forward passes" in heard
