"""The typer app: which commands there are. A command's module is imported when it runs, so that help needs none."""

from __future__ import annotations

import importlib
from typing import Annotated, Any

import typer
import typer.core
import typer.main

__all__ = ["app"]

COMMANDS = {
    "extend": "Change a checkpoint - context, attention, tokens - and write the new one.",
    "train": "Extend a checkpoint and train it, by one YAML file.",
    "inspect": "Show a checkpoint's structure, layer by layer, and what it costs at a given length.",
    "eval": "Measure what a model makes of long text: perplexity, and finding things.",
    "demo": "Do the main job on a small real model, with nothing to fetch.",
    "plot": "Draw rotary wavelengths or attention patterns as PNG.",
    "bench": "Measure longattn beside its peers on this machine.",
    "doctor": "Show versions, what was compiled, and which path serves each op.",
}


def _command(name: str, function: Any, help: str | None = None) -> Any:
    single = typer.Typer(add_completion=False)
    single.command(name, help=help)(function)
    return typer.main.get_command(single)


def _load(name: str) -> Any:
    """The command `name`: its module's typer app where it has one, else the function of its name."""
    module = importlib.import_module(f"longattn.cli.{name}")
    if hasattr(module, "app"):
        return typer.main.get_command(module.app)
    return _command(name, getattr(module, name))


class _Lazy(typer.core.TyperGroup):
    """Lists commands by name and one line of help, and imports the one that runs."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, line in COMMANDS.items():
            self.add_command(_command(name, lambda: None, line), name)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if listed is None else _load(str(name)), rest


app = typer.Typer(cls=_Lazy, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _version(wanted: bool) -> None:
    if wanted:
        from longattn.info import build_info

        typer.echo(f"longattn {build_info()['longattn']}")
        raise typer.Exit


@app.callback()
def longattn(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Longer context, new tokens and other attention patterns for pretrained language models."""
