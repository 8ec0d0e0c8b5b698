"""The command line: `longattn <command>`, a module a command; changes when commands come or start otherwise."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["app", "main"]

# Which extra brings a module that a command may miss.
EXTRAS = {
    "accelerate": "train",
    "click": "cli",
    "datasets": "train",
    "matplotlib": "plot",
    "peft": "train",
    "pyarrow": "train",
    "rich": "cli",
    "safetensors": "hf",
    "tokenizers": "hf",
    "transformers": "hf",
    "typer": "cli",
    "yaml": "cli",
}


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'longattn.cli' has no attribute {name!r}")
    from longattn.cli.commands import app

    return app


def main() -> None:
    """Run the command that `sys.argv` names; where an extra is missing, print the one command that mends it."""
    try:
        from longattn.cli.commands import app

        app(prog_name="longattn")
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS:
            raise
        print(f"longattn: this needs {missing}: pip install 'longattn[{EXTRAS[missing]}]'", file=sys.stderr)
        sys.exit(2)
