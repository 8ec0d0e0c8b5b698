"""`longattn extend SRC DST`: reads flags, changes a checkpoint, shows progress and what changed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from longattn.cli.console import late_progress
from longattn.cli.plan_flags import (
    AddToken,
    Attention,
    Context,
    Factor,
    PadToMultipleOf,
    Plain,
    PlanFile,
    RopeEntry,
    RopeType,
    Source,
    TokenInit,
    TokenOutputInit,
    TrainAttention,
    errors_in_one_line,
    plan_of_flags,
)

__all__ = ["extend"]

Export = Annotated[
    str | None,
    typer.Option(
        metavar="stock",
        help="Write a checkpoint that transformers loads without longattn; without other flags SRC is only converted: "
        "--export stock",
    ),
]


def extend(
    src: Source,
    dst: Annotated[
        Path | None, typer.Argument(metavar="DST", help="The folder to write, which must not exist: ./longer")
    ] = None,
    plan: PlanFile = None,
    rope_type: RopeType = None,
    factor: Factor = None,
    rope: RopeEntry = None,
    context: Context = None,
    attention: Attention = None,
    train_attention: TrainAttention = None,
    add_token: AddToken = None,
    token_init: TokenInit = None,
    token_output_init: TokenOutputInit = None,
    plain: Plain = False,
    pad_to_multiple_of: PadToMultipleOf = None,
    export: Export = None,
    allow_pickle: Annotated[
        bool,
        typer.Option(
            "--allow-pickle",
            help="Read pytorch_model.bin where SRC has no safetensors: its tensors, nothing that a pickle would run: "
            "longattn extend SRC ... --allow-pickle",
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Say what would change and write nothing: longattn extend SRC ... --dry-run"),
    ] = False,
) -> None:
    """Change a checkpoint's rotary embedding, length, attention or tokens, and write the new one to DST.

    For example: longattn extend ./model ./longer --rope-type yarn --factor 8 --add-token '<tool>'
    """
    with errors_in_one_line("extend"):
        wanted = plan_of_flags(
            plan_file=plan,
            rope_type=rope_type,
            factor=factor,
            rope=rope,
            context=context,
            attention=attention,
            train_attention=train_attention,
            add_token=add_token,
            token_init=token_init,
            token_output_init=token_output_init,
            plain=plain,
            pad_to_multiple_of=pad_to_multiple_of,
        )
        form = _form(export)
        if wanted is None and form is None:
            raise ValueError(
                "say what to change: --plan, --rope-type, --factor, --context, --attention, --add-token, --export, ..."
            )
        from longattn.checkpoint import extend_checkpoint, preview_checkpoint

        if dry_run:
            typer.echo(str(preview_checkpoint(src, wanted, export=form, allow_pickle=allow_pickle)))
            return
        if dst is None:
            raise ValueError("DST is missing; give the folder to write, or --dry-run")
        columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn()
        with late_progress(*columns, TransferSpeedColumn(), TimeRemainingColumn()) as update:
            report = extend_checkpoint(
                src,
                dst,
                wanted,
                export=form,
                allow_pickle=allow_pickle,
                progress=lambda name, done, total: update(name, total=total, completed=done),
            )
        typer.echo(str(report))
        typer.echo(f"wrote {dst}")


def _form(export: str | None) -> Literal["stock"] | None:
    if export is None or export == "stock":
        return export  # type: ignore[return-value]
    raise ValueError(f"--export must be stock, got {export!r}")
