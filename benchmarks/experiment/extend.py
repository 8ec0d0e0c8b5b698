"""Extend the bases by every row of `plans.py`, measure each, and gather `benchmarks/results/experiment.json`.

    OMP_NUM_THREADS=1 python benchmarks/experiment/extend.py

Start it once a core: each takes rows that no other has taken or measured, one file a row, and a run that was ended goes
on where it was. Seeds without a base are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import plans
import torch
from corpus import Ids, documents, token_stream, training_rows
from scores import attention_on_first, recall, streamed_perplexity, text_perplexity, text_windows
from taking import taken
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuning import attends, fine_tune, row_losses

import longattn
from longattn.bench.machine import machine_facts

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Settings:
    """How much is measured; rows of different settings are not put into one table."""

    steps: int = 24
    tokens_a_step: int = 4096
    windows: int = 16
    recall_rows: int = 16
    streams: int = 6
    held_out_tokens: int = 16384


QUICK = Settings(steps=3, tokens_a_step=512, windows=2, recall_rows=2, streams=1, held_out_tokens=512)


class Bench:
    """A base, and the texts as its tokenizer reads them."""

    def __init__(self, folder: Path, settings: Settings, files: int | None) -> None:
        self.folder, self.settings = folder, settings
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.length = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
        self.contexts = [self.length * times for times in (1, 2, 4, 8)]
        trained, scored = documents(files)
        self.ids = Ids.of(self.tokenizer)
        self.stream = token_stream(trained, self.tokenizer)
        self.held_out = token_stream(scored, self.tokenizer)
        self.windows = text_windows(scored, self.tokenizer, length=self.contexts[-1], count=settings.windows)
        self.streams = text_windows(scored, self.tokenizer, length=2 * self.contexts[-1], count=settings.streams)

    def measure(self, row: plans.Row, seed: int) -> dict[str, Any]:
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        plan = row.plan(self.length)
        if plan is not None:
            longattn.extend(model, None, plan)
        found: dict[str, Any] = {}
        if row.learns != "nothing":
            model, found["training"] = self._trained(model, row, seed)
        found["perplexity"] = {n: round(text_perplexity(model, self.windows, n), 4) for n in self.contexts}
        asked = dict(rows=self.settings.recall_rows)
        found["recall"] = {n: recall(model, self.held_out, self.ids, length=n, **asked) for n in self.contexts}
        if "window" in row.serve or (row.learns == "nothing" and row.rope in ("none", "yarn")):
            edges = [0, self.length // 2, *self.contexts, 2 * self.contexts[-1]]
            scores = streamed_perplexity(model, self.streams, edges)
            found["streamed"] = {part: round(score, 4) for part, score in scores.items()}
        if plan is None:
            found["attention_on_first"] = attention_on_first(model, self.windows, self.length)
        return found

    def _trained(self, model: Any, row: plans.Row, seed: int) -> tuple[Any, dict[str, Any]]:
        length = row.factor * self.length
        rows = max(1, self.settings.tokens_a_step // length)
        with attends(model, row.train, self.length):
            model, found = fine_tune(
                model,
                self.stream,
                self.ids,
                learns=row.learns,
                rate=row.rate or plans.RATES[row.learns],
                length=length,
                steps=self.settings.steps,
                rows=rows,
                seed=seed,
                first=self.length // 2,
            )
        draw = torch.Generator().manual_seed(0)
        count = max(2, self.settings.held_out_tokens // length)
        batch = training_rows(self.held_out, self.ids, rows=count, length=length, draw=draw)
        # the same held-out rows, read as in training and as the model is served
        with attends(model, row.train, self.length):
            found["held_out_as_trained"] = _held_out(model.train(), batch, self.length // 2)
        found["held_out_as_read"] = _held_out(model.eval(), batch, self.length // 2)
        return model, found


@torch.no_grad()
def _held_out(model: Any, batch: torch.Tensor, first: int) -> dict[str, float]:
    each = torch.cat([row_losses(model, part) for part in batch.split(4)])
    return {"loss": round(each.mean().item(), 4), "first": round(each[:, : first - 1].mean().item(), 4)}


def run(
    bases: Path, parts: Path, rows: list[plans.Row], seeds: list[int], settings: Settings, files: int | None
) -> None:
    """Measure what is missing, row by row over the seeds, so that whatever time there is gives whole rows."""
    benches: dict[int, Bench] = {}
    for row in rows:
        for seed in seeds if row.rate is None else seeds[:1]:
            path = parts / f"{row.name}_seed{seed}.json"
            if not (bases / f"seed-{seed}" / "training.json").exists():
                continue
            with taken(path) as mine:
                if not mine:
                    continue
                if seed not in benches:
                    benches[seed] = Bench(bases / f"seed-{seed}", settings, files)
                began = time.process_time()
                found = benches[seed].measure(row, seed)
                spent = round(time.process_time() - began, 1)
                facts = {"name": row.name, "seed": seed, **asdict(row), "processor_seconds": spent}
                part = path.with_suffix(".part")
                part.write_text(
                    json.dumps({**facts, "settings": asdict(settings), "machine": machine_facts(), **found})
                )
                part.rename(path)
                print(f"{row.name} seed {seed}: {spent} s", flush=True)


def gather(bases: Path, parts: Path, rows: list[plans.Row], seeds: list[int], settings: Settings) -> dict[str, Any]:
    """All rows that were measured with these settings, in the order of the table, in one mapping."""
    found, machines = [], []
    for row in rows:
        for seed in seeds:
            path = parts / f"{row.name}_seed{seed}.json"
            part = json.loads(path.read_text()) if path.exists() else {}
            if part.pop("settings", None) == asdict(settings):
                machine = part.pop("machine")
                dated = {key: machine.pop(key) for key in ("commit", "date")}
                machines += [machine] if machine not in machines else []
                found.append({**part, **dated, "machine": machines.index(machine)})
    records = {seed: bases / f"seed-{seed}" / "training.json" for seed in seeds}
    trained = {seed: json.loads(path.read_text()) for seed, path in records.items() if path.exists()}
    return {
        "settings": asdict(settings),
        "machines": machines,
        "bases": trained,
        "rows": found,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", type=Path, default=HERE / "bases")
    parser.add_argument("--parts", type=Path, default=Path("longattn-experiment"))
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "experiment.json")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name holds one of these")
    parser.add_argument("--files", type=int, help="read so many files of each kind only")
    parser.add_argument("--quick", action="store_true", help="few steps and texts; for a test of the code")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)
    settings = QUICK if args.quick else Settings()
    length = json.loads((args.bases / f"seed-{args.seeds[0]}" / "config.json").read_text())["max_position_embeddings"]
    rows = [row for row in plans.rows(length) if any(part in row.name for part in args.only)]
    run(args.bases, args.parts, rows, args.seeds, settings, args.files)
    args.out.write_text(json.dumps(gather(args.bases, args.parts, rows, args.seeds, settings), indent=1) + "\n")


if __name__ == "__main__":
    main()
