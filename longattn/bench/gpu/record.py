"""The results file of a GPU: one JSON, written anew after every cell, that a run picks up where the last one ended."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

__all__ = ["Record"]

IDENTITY = ("device", "driver", "torch", "commit", "sources", "hopper")


class Record:
    """Cells by name, with the facts of the machine that they were measured on.

    Args:
        folder: where `<device>-<date>.json` lies. The newest of the same device, driver, torch and sources is gone on
            with; another one is left alone.
        facts: of this machine; every cell keeps those that may differ between runs.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        name = re.sub(r"[^a-z0-9]+", "-", str(facts["device"]).lower()).strip("-") + f"-{facts['hopper']}".rstrip("-")
        self.facts = facts
        self.path = folder / f"{name}-{facts['date'][:10]}.json"
        self.content: dict[str, Any] = {"format": 1, "machine": facts, "ceilings": [], "cells": {}}
        for path in sorted(folder.glob(f"{name}-*.json"), reverse=True):
            known = json.loads(path.read_text())
            if all(known["machine"].get(key) == facts.get(key) for key in IDENTITY):
                self.path, self.content = path, known
                break
        else:
            if self.path.exists():  # of other sources, the same day
                self.path = self.path.with_stem(f"{self.path.stem}-{facts['sources']}")

    @property
    def cells(self) -> dict[str, Any]:
        return self.content["cells"]

    def add_ceilings(self, rates: dict[str, float]) -> None:
        self.content["ceilings"].append({"date": self.facts["date"], **rates})
        self._write()

    def add(self, name: str, cell: dict[str, Any]) -> None:
        self.cells[name] = {"machine": self.facts, **cell}
        self._write()

    def _write(self) -> None:
        written = self.path.with_suffix(".part")
        written.write_text(json.dumps(self.content, indent=1) + "\n")
        written.replace(self.path)
