"""`longattn inspect SRC`: a checkpoint's structure, layer by layer, and its costs, before and after a plan."""

from __future__ import annotations

import json
import math
from itertools import groupby
from typing import Annotated

import typer
from rich.table import Table

from longattn.cli.console import table_console
from longattn.cli.plan_flags import (
    Attention,
    Factor,
    PlanFile,
    RopeEntry,
    RopeType,
    Source,
    TrainAttention,
    errors_in_one_line,
    plan_of_flags,
)
from longattn.structure import LayerStructure, Structure, inspect_checkpoint, models_of
from longattn.units import format_bytes, format_flops

__all__ = ["inspect"]

WIDTH = 120  # of a table that goes to a file or a pipe


def inspect(
    src: Source,
    context: Annotated[
        int | None,
        typer.Option(
            help="The length to compute costs at, with --rope-type and no --factor also the plan's: --context 32768 "
            "(default: the longest that the model serves)"
        ),
    ] = None,
    plan: PlanFile = None,
    rope_type: RopeType = None,
    factor: Factor = None,
    rope: RopeEntry = None,
    attention: Attention = None,
    train_attention: TrainAttention = None,
    ranks: Annotated[
        int | None, typer.Option(help="Also what the text costs each of so many ranks that share it: --ranks 64")
    ] = None,
    link: Annotated[
        str, typer.Option(help="What a rank sends in a second, in bytes or in bits (b): --link 400Gb/s")
    ] = "45GB/s",
    flops: Annotated[str, typer.Option(help="Operations in a second that a rank sustains: --flops 400T")] = "400T",
    full: Annotated[
        str,
        typer.Option(help="How full layers get all keys over ranks, gather or ulysses: --full ulysses"),
    ] = "gather",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: longattn inspect SRC --json")] = False,
) -> None:
    """Show a checkpoint's structure and what it costs at a length, before and after a plan.

    For example: longattn inspect ./model --context 32768 --attention '3 x window:4096, 1 x full'

    Over ranks: longattn inspect ./model --context 1048576 --attention window:4096 --ranks 8 --link 45GB/s
    """
    with errors_in_one_line("inspect"):
        needs_length = (rope_type is not None or bool(rope)) and factor is None
        wanted = plan_of_flags(
            plan_file=plan,
            rope_type=rope_type,
            factor=factor,
            rope=rope,
            context=context if needs_length and plan is None else None,
            attention=attention,
            train_attention=train_attention,
        )
        before, after = inspect_checkpoint(src, context=context, plan=wanted)
        over = None
        if ranks is not None:
            from longattn.cli.inspect_ranks import forecasts

            over = forecasts(models_of(src, wanted), before.context, ranks, link=link, flops=flops, full=full)
        if as_json:
            output = {"before": before.to_dict(), "after": None if after is None else after.to_dict()}
            if over is not None:
                output["ranks"] = over.to_dict()
            typer.echo(json.dumps(output, indent=2))
            return
        console = table_console(WIDTH)
        console.print(_layers(before, "layers" if after is None else "layers before"))
        if after is not None:
            console.print(_layers(after, "layers after"))
        console.print(_costs(before, after))
        if over is not None:
            console.print(over.table())


def _layers(structure: Structure, title: str) -> Table:
    """A row for each run of equal layers."""
    heading = f"{title}: {structure.model_type}, {structure.max_position_embeddings:,} positions"
    table = Table(title=heading, title_justify="left")
    for column in ("layers", "attention", "in training", "rope", "wavelengths (tokens)", "heads", "cached tokens"):
        table.add_column(column)
    first = 0
    for layer, run in groupby(structure.layers):
        count = len(list(run))
        numbers = str(first) if count == 1 else f"{first}-{first + count - 1}"
        first += count
        train = "as served" if layer.train_attention == layer.attention else layer.train_attention
        table.add_row(
            numbers,
            layer.attention,
            train,
            layer.rope_type,
            _wavelengths(layer),
            _heads(layer),
            f"{layer.cached_tokens:,}",
        )
    return table


def _wavelengths(layer: LayerStructure) -> str:
    shortest, longest = layer.wavelengths
    return f"{shortest:.3g} to {'infinite' if math.isinf(longest) else f'{longest:,.0f}'}"


def _heads(layer: LayerStructure) -> str:
    return f"{layer.heads} of {layer.head_dim}, {layer.kv_heads} kv"


def _costs(before: Structure, after: Structure | None) -> Table:
    table = Table(title=f"one text of {before.context:,} tokens", title_justify="left")
    table.add_column("cost")
    for column in ["now"] if after is None else ["before", "after", "after / before"]:
        table.add_column(column, justify="right")
    rows = {
        "KV cache": ("kv_cache_bytes", format_bytes),
        "attention, whole text": ("prefill_flops", format_flops),
        "attention, last token": ("decode_flops", format_flops),
        "activations, training": ("activation_bytes", format_bytes),
        "activations, training with checkpointing": ("checkpointed_bytes", format_bytes),
        "window mask of stock attention": ("stock_mask_bytes", format_bytes),
    }
    for name, (field, text) in rows.items():
        old = getattr(before.costs, field)
        if after is None:
            table.add_row(name, text(old))
            continue
        new = getattr(after.costs, field)
        table.add_row(name, text(old), text(new), f"{new / old:.3g}" if old else "-")
    return table
