"""The main job on a small real model, on any machine: longer context, another attention, new tokens, all measured."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

__all__ = ["MODEL_FOLDER", "missing_extras"]

MODEL_FOLDER = Path(__file__).parent / "model"
NEEDED = {"transformers": "hf", "tokenizers": "hf", "safetensors": "hf", "rich": "cli", "matplotlib": "plot"}


def missing_extras() -> tuple[list[str], list[str]]:
    """The packages that the demo needs and that are not installed, and the extras of longattn that bring them."""
    packages = [package for package in NEEDED if find_spec(package) is None]
    return packages, sorted({NEEDED[package] for package in packages})
