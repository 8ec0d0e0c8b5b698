"""`longattn demo`: runs the demo with a progress bar, prints its tables and writes its pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["demo"]

WIDTH = 100  # of a table that goes to a file or a pipe


def demo(
    out: Annotated[
        Path, typer.Option(help="A new folder, or one of an earlier demo: checkpoints, results.json, PNGs go there.")
    ] = Path("longattn-demo"),
) -> None:
    """Extend a small real model by every method, on this machine, and measure what each change does."""
    from longattn.demo import missing_extras

    packages, extras = missing_extras()
    if packages:
        missing = ", ".join(packages)
        typer.echo(f"longattn demo: needs {missing}: pip install 'longattn[{','.join(extras)}]'", err=True)
        raise typer.Exit(2)
    # nothing is fetched, and nothing asks whether there is something to fetch; read when transformers is imported
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        _run(out)
    except (ValueError, OSError) as error:
        typer.echo(f"longattn demo: {str(error).removeprefix('demo: ')}", err=True)
        raise typer.Exit(2) from None


def _run(out: Path) -> None:
    import transformers

    from longattn.cli.console import late_progress, table_console, work_columns
    from longattn.demo.plots import write_plots
    from longattn.demo.report import print_results
    from longattn.demo.run import Settings, run_demo

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings = Settings()
    with late_progress(*work_columns(), transient=True) as update:
        update("reading the standard library", total=settings.work())
        results = run_demo(out, settings, progress=lambda doing, work: update(doing, advance=work))
        update("drawing")
        pictures = write_plots(results, out)
    console = table_console(WIDTH)
    print_results(results, console)
    console.print(f"\n{results.seconds:.0f} s. Wrote {', '.join(picture.name for picture in pictures)}, results.json")
    console.print(f"and checkpoints/ to {out}", soft_wrap=True, highlight=False)
