"""The plan's keys as flags, shared by the commands that take a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from longattn.plan import Plan
from longattn.plan_yaml import load_yaml

__all__ = [
    "AddToken",
    "Attention",
    "Context",
    "Factor",
    "PadToMultipleOf",
    "PlanFile",
    "Plain",
    "RopeEntry",
    "RopeType",
    "Source",
    "TokenInit",
    "TokenOutputInit",
    "TrainAttention",
    "errors_in_one_line",
    "plan_of_flags",
]

# brackets are markup in help texts unless a backslash is before them
Source = Annotated[
    str,
    typer.Argument(metavar="SRC", help="A checkpoint's folder, or the id of a model on the Hub: ./model, us/model."),
]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="A YAML file with the plan, in place of its flags: --plan plan.yaml"),
]
RopeType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="How long texts get their rotary angles: linear, ntk, dynamic, by-parts, yarn, longrope, llama3, "
        "proportional or default: --rope-type yarn --factor 8",
    ),
]
Factor = Annotated[
    float | None, typer.Option(help="How many times longer the context becomes: --rope-type yarn --factor 8")
]
RopeEntry = Annotated[
    list[str] | None,
    typer.Option(
        "--rope",
        metavar="KEY=VALUE",
        help="Any other rope parameter, of one layer type where KEY is LAYER_TYPE.KEY; repeatable: "
        "--rope rope_theta=1e6 --rope full_attention.factor=8",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(help="The new length in tokens, in place of --factor: --rope-type yarn --context 32768"),
]
Attention = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERNS",
        help="Which keys each layer's queries see, cycled over the layers: "
        "--attention '3 x window:4096+sinks:4, 1 x full'; or a list, one a layer: --attention '\\[full, window:4096]'",
    ),
]
TrainAttention = Annotated[
    str | None,
    typer.Option(
        metavar="PATTERNS",
        help="The same while the model trains: --train-attention group:2048+shift (default: as --attention)",
    ),
]
AddToken = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TOKEN",
        help="A new token, or ROLE=TOKEN; repeatable: --add-token '<tool>' --add-token 'pad_token=<pad>'",
    ),
]
TokenInit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOW",
        help="What new rows are: mean, subwords, copy:TOKEN, or for each token TOKEN=DESCRIPTION: "
        "--token-init '<tool>=a tool is called' (default: mean)",
    ),
]
TokenOutputInit = Annotated[
    list[str] | None,
    typer.Option(
        metavar="HOW",
        help="The same for an output embedding of its own: --token-output-init mean (default: as --token-init)",
    ),
]
Plain = Annotated[
    bool,
    typer.Option(
        "--plain", help="New tokens are ordinary ones, which decoding shows, not special ones: --add-token tool --plain"
    ),
]
PadToMultipleOf = Annotated[
    int | None, typer.Option(help="Round the embedding's rows up to a multiple: --pad-to-multiple-of 64")
]

ROLE = re.compile(r"^([a-z]+_token)=(.+)$", re.DOTALL)


def plan_of_flags(
    *,
    plan_file: Path | None,
    rope_type: str | None,
    factor: float | None,
    rope: Sequence[str] | None,
    context: int | None,
    attention: str | None,
    train_attention: str | None,
    add_token: Sequence[str] | None = None,
    token_init: Sequence[str] | None = None,
    token_output_init: Sequence[str] | None = None,
    plain: bool = False,
    pad_to_multiple_of: int | None = None,
) -> Plan | None:
    """Make the plan that flags describe; None where none is given.

    Raises:
        OSError: the plan's file can't be read.
        TypeError, ValueError: a flag contradicts another, or as `longattn.Plan`.
    """
    parts: dict[str, Any] = {
        "rope": _rope(rope_type, factor, rope or ()),
        "context": context,
        "attention": _patterns(attention),
        "train_attention": _patterns(train_attention),
        "tokens": _tokens(add_token or (), token_init, token_output_init, plain, pad_to_multiple_of),
    }
    parts = {key: value for key, value in parts.items() if value is not None}
    if plan_file is None:
        return Plan(**parts) if parts else None
    if parts:
        raise ValueError(f"give --plan or the plan's parts as flags, not both; got --plan and {', '.join(parts)}")
    return Plan.from_yaml(plan_file)


def _rope(rope_type: str | None, factor: float | None, entries: Sequence[str]) -> dict[str, Any] | None:
    rope: dict[str, Any] = {}
    if rope_type is not None:
        rope["rope_type"] = rope_type
    if factor is not None:
        rope["factor"] = factor
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or not key:
            raise ValueError(f"--rope must be KEY=VALUE, got {entry!r}")
        layer_type, _, name = key.rpartition(".")
        part = rope.setdefault(layer_type, {}) if layer_type else rope
        if not isinstance(part, dict):
            raise ValueError(f"--rope gives {layer_type} both a value and {key}")
        if name in part:
            raise ValueError(f"--rope gives {key} twice, or beside the flag of that name")
        part[name] = load_yaml(text, f"--rope {key}")
    return rope or None


def _patterns(text: str | None) -> Any:
    """A list, one pattern a layer, is written as in YAML."""
    if text is None or not text.lstrip().startswith("["):
        return text
    return load_yaml(text, "--attention")


def _tokens(
    tokens: Sequence[str],
    init: Sequence[str] | None,
    output_init: Sequence[str] | None,
    plain: bool,
    pad_to_multiple_of: int | None,
) -> dict[str, Any] | None:
    if not tokens:
        if init or output_init or plain or pad_to_multiple_of is not None:
            raise ValueError("--token-init, --token-output-init, --plain and --pad-to-multiple-of need --add-token")
        return None
    roles = {match[1]: match[2] for token in tokens if (match := ROLE.match(token))}
    others = [token for token in tokens if not ROLE.match(token)]
    if len(roles) + len(others) != len(tokens):
        raise ValueError(f"--add-token gives a role twice: {', '.join(tokens)}")
    both = {**roles, "extra_special_tokens": others} if others else roles
    names = others + list(roles.values())
    parts = {
        "tokens": both if roles else others,
        "special": False if plain else None,
        "init": _init(init, names, "--token-init"),
        "output_init": _init(output_init, names, "--token-output-init"),
        "pad_to_multiple_of": pad_to_multiple_of,
    }
    return {key: value for key, value in parts.items() if value is not None}


def _init(texts: Sequence[str] | None, tokens: Sequence[str], flag: str) -> str | dict[str, str] | None:
    if not texts:
        return None
    described: dict[str, str] = {}
    for text in texts:
        token = next((token for token in tokens if text.startswith(f"{token}=")), None)
        if token is None and len(texts) > 1:
            raise ValueError(f"{flag} more than once must be TOKEN=DESCRIPTION with a new token, got {text!r}")
        if token is not None:
            described[token] = text.removeprefix(f"{token}=")
    return described or texts[0]


@contextmanager
def errors_in_one_line(command: str) -> Iterator[None]:
    """End a command with exit code 2 and one line for an error that the user can mend."""
    try:
        yield
    except BrokenPipeError:  # who reads the output has gone: click ends quietly
        raise
    except (OSError, TypeError, ValueError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = lines[0] if lines else type(error).__name__
        # what a command does on its way names itself in Python; people typed one command
        for name in (command, "extend"):
            message = message.removeprefix(f"{name}: ")
        typer.echo(f"longattn {command}: {message}", err=True)
        raise typer.Exit(2) from None
