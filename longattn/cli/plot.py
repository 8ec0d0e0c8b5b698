"""`longattn plot rope` and `longattn plot mask`: reads flags and a checkpoint's config, writes a picture."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

app = typer.Typer(
    help="Draw rotary wavelengths or attention patterns as PNG.", no_args_is_help=True, add_completion=False
)

DEFAULT_TYPES = ("linear", "ntk", "yarn", "llama3")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("longattn plot: needs matplotlib: pip install 'longattn[plot]'", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(f"longattn plot: cannot open {error.filename}: {error.strerror}", err=True)
        raise typer.Exit(2) from None
    except (ValueError, TypeError) as error:
        typer.echo(f"longattn plot: {error}", err=True)
        raise typer.Exit(2) from None


def _write(figure: Figure, out: Path) -> None:
    figure.savefig(out)
    typer.echo(f"wrote {out}")


@app.command()
def rope(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder: its config.json gives what no flag gives."),
    ] = None,
    types: Annotated[
        list[str] | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="A rope type to draw, repeatable: --type linear --type yarn (default: the checkpoint's own, or the "
            "common ones)",
        ),
    ] = None,
    factor: Annotated[float, typer.Option(help="How many times longer the context becomes: --factor 4")] = 8.0,
    theta: Annotated[
        float | None, typer.Option(help="rope_theta: --theta 5e5 (default: 10000, or the checkpoint's)")
    ] = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Channels of a head: --head-dim 64 (default: 128, or the checkpoint's)")
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Original context in tokens: --context 8192 (default: 4096, or the checkpoint's)")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where the picture goes: --out rope.png")] = Path("rope.png"),
) -> None:
    """Draw the wavelength of each rotary frequency, before and after scaling."""
    with _errors_in_one_line():
        from longattn.plots import plot_wavelengths
        from longattn.rope import rope_frequencies, rope_layers

        config: dict[str, Any] = {"rope_theta": 10_000.0, "head_dim": 128}
        if checkpoint is not None:
            config = _read_config(checkpoint)
        layers = rope_layers(_stored_rope(config))
        # new types are drawn for the layers that see the whole text, as a flat plan changes those
        main = "full_attention" if "full_attention" in layers else next(iter(layers))
        dims = {layer_type: head_dim or _head_dim(config, layer_type) for layer_type in layers}
        stored = {layer_type: _with_theta(rope, theta) for layer_type, rope in layers.items()}
        length = config.get("max_position_embeddings") or 4096
        original = context or stored[main].get("original_max_position_embeddings") or length

        kept = ("rope_theta", "partial_rotary_factor")
        unscaled = {key: stored[main][key] for key in kept if stored[main].get(key) is not None}
        curves: dict[str, Tensor] = {}
        if checkpoint is not None:
            for layer_type, rope_parameters in stored.items():
                name = "stored" if layer_type is None else f"stored, {layer_type}"
                curves |= _curves(name, rope_parameters, dims[layer_type], length, factor)
        for rope_type in types or (DEFAULT_TYPES if checkpoint is None else ()):
            curves |= _curves(rope_type, _scaled(unscaled, rope_type, factor, original), dims[main], original, factor)
        baseline, _ = rope_frequencies(unscaled, dims[main])
        title = "Rotary wavelengths"
        if len(layers) == 1:
            title += f": theta {unscaled['rope_theta']:,.10g}, head dim {dims[main]}"
        title += f", factor {factor:g}" if types or checkpoint is None else ""
        # layer types differ in theta, so there a stretch relative to one of them would mislead
        figure = plot_wavelengths(curves, baseline if len(layers) == 1 else None, context=original, title=title)
        _write(figure, out)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint} must be a checkpoint's folder, it has no config.json")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return config.get("text_config") or config


def _stored_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' v5 `rope_parameters`, or v4's `rope_scaling` with what stands beside it."""
    if rope_parameters := config.get("rope_parameters"):
        return rope_parameters
    beside = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    return {**(config.get("rope_scaling") or {}), **beside}


def _head_dim(config: Mapping[str, Any], layer_type: str | None) -> int:
    layer_types = config.get("layer_types") or []
    for layer, own in (config.get("per_layer_config") or {}).items():  # Gemma 4
        if layer_type is not None and layer_types[int(layer)] == layer_type and own.get("head_dim"):
            return own["head_dim"]
    if config.get("head_dim"):
        return config["head_dim"]
    try:
        return config["hidden_size"] // config["num_attention_heads"]
    except KeyError as error:
        raise ValueError(f"config.json has no {error}; give --head-dim") from None


def _with_theta(rope_parameters: Mapping[str, Any], theta: float | None) -> dict[str, Any]:
    if theta is None and rope_parameters.get("rope_theta") is None:
        raise ValueError("config.json has no rope_theta; give --theta")
    return {**rope_parameters, **({} if theta is None else {"rope_theta": theta})}


def _scaled(unscaled: Mapping[str, Any], rope_type: str, factor: float, original: int) -> dict[str, Any]:
    """Rotary parameters of a type, with Llama 3.1's own turns for llama3."""
    rope_parameters = {
        **unscaled,
        "rope_type": rope_type,
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    return rope_parameters | ({"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {})


def _curves(
    name: str, rope_parameters: Mapping[str, Any], head_dim: int, length: int, factor: float
) -> dict[str, Tensor]:
    """The curve of one method, or two where its frequencies depend on the length of the text."""
    from longattn.rope import rope_frequencies

    rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
    label = f"{name} ({rope_type})" if name.startswith("stored") else name
    if rope_type not in ("dynamic", "longrope"):
        return {label: rope_frequencies(rope_parameters, head_dim, max_position_embeddings=length)[0]}
    long = max(int(length * factor), length + 1)
    return {
        f"{label}, {texts}": rope_frequencies(
            rope_parameters, head_dim, max_position_embeddings=length, seq_len=seq_len
        )[0]
        for texts, seq_len in (("short texts", None), (f"{long:,} tokens", long))
    }


@app.command()
def mask(
    patterns: Annotated[
        list[str],
        typer.Argument(
            metavar="PATTERNS",
            help="Patterns, or lists of them: 'window:8+sinks:2' 'group:8+shift' '3 x window:8, 1 x full'",
        ),
    ],
    tokens: Annotated[
        int | None, typer.Option(help="Length of the text: --tokens 64 (default: 4 times the largest window or group)")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads; half of them see shifted groups: --heads 4")] = 2,
    out: Annotated[Path, typer.Option(help="Where the picture goes: --out mask.png")] = Path("mask.png"),
) -> None:
    """Draw which keys each query sees."""
    with _errors_in_one_line():
        from longattn.pattern import parse_patterns
        from longattn.plots import plot_masks

        # a term's count says how many layers have it, not that it looks different
        terms = [parse_patterns(term, 1)[0] for text in patterns for term in text.split(",")]
        distinct = list(dict.fromkeys(terms))
        num_tokens = tokens if tokens is not None else 4 * max(8, max(pattern.size for pattern in distinct))
        _write(plot_masks(distinct, num_tokens, num_heads=heads), out)
