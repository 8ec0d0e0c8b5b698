"""Registers longattn with transformers when its modelling code is imported, whichever of the two is imported first.

A checkpoint with a pattern names longattn's attention in its config, and transformers must know the name before it
builds the model; importing its modelling code here already would make `import longattn` several seconds slower.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_when_loaded"]

MODELLING = "transformers.modeling_utils"


class _ThenRegister(Loader):
    """Runs a module with its own loader, then imports longattn.hf."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("longattn.hf")

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_source and the like, for tracebacks and inspect


class _Finder(MetaPathFinder):
    """Finds transformers' modelling code once, as Python would, and wraps its loader."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != MODELLING:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def register_when_loaded() -> None:
    """Import longattn.hf now where transformers' modelling code is loaded, else as soon as it is."""
    if MODELLING in sys.modules:
        importlib.import_module("longattn.hf")
    else:
        sys.meta_path.insert(0, _Finder())
