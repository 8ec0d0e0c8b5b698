"""What `longattn inspect --ranks` adds: the costs of a text that is sharded over ranks."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from longattn.distributed.forecast import Forecast, Step, forecast
from longattn.structure import decoder_of
from longattn.units import format_bytes, format_seconds

__all__ = ["OverRanks", "forecasts", "read_flops", "read_link"]

PREFIXES = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
AT_MOST = 4096  # ranks, whose bytes are counted one by one


@dataclass(frozen=True)
class OverRanks:
    """Forecasts by what they are of, "before" and "after": of serving and of training."""

    tokens: int
    link: float
    flops: float
    full: str
    found: dict[str, tuple[Forecast, Forecast]]

    def to_dict(self) -> dict[str, Any]:
        """Give the forecasts as a JSON-able dict; a step's bytes are those of the rank that sends most."""
        output: dict[str, Any] = {"link": self.link, "flops": self.flops, "full": self.full}
        for name, (serving, training) in self.found.items():
            fields = asdict(training)
            for step in ("forward", "training", "checkpointed"):
                fields[step] = _step(getattr(serving if step == "forward" else training, step))
            output[name] = fields
        return output

    def table(self) -> Table:
        ranks, tokens = next((f.ranks, f.tokens) for f, _ in self.found.values())
        title = (
            f"one text of {self.tokens:,} tokens over {ranks:,} ranks, {tokens:,} each; link {self.link / 1e9:g} GB/s, "
            f"{self.flops / 1e12:g} TFLOP/s sustained, full layers: {self.full}"
        )
        table = Table(title=title, title_justify="left")
        table.add_column("on the rank that has most")
        for column in self.found:
            table.add_column("now" if len(self.found) == 1 else column, justify="right")
        rows = [self._rows(*both) for both in self.found.values()]
        for name in rows[0]:
            table.add_row(name, *(row[name] for row in rows))
        return table

    def _rows(self, serving: Forecast, training: Forecast) -> dict[str, str]:
        memory = {
            "weights, gradients, AdamW in float32, sharded": training.parameter_bytes,
            "activations, training": training.activation_bytes,
            "activations, training with checkpointing": training.checkpointed_bytes,
            "keys and values of other ranks, training": training.remote_bytes,
            "the same with checkpointing": training.remote_layer_bytes,
            "KV cache of the rank's tokens": serving.cache_bytes,
        }
        rows = {name: format_bytes(number) for name, number in memory.items()}
        steps = {"prefill": serving.forward, "training step": training.training, "checkpointed": training.checkpointed}
        for name, step in steps.items():
            rows[f"{name}: sent"] = format_bytes(max(step.sent_bytes))
            rows[f"{name}: computing, sending"] = (
                f"{format_seconds(step.compute_s)}, {format_seconds(step.communication_s)}"
            )
            rows[f"{name}: share of sending, if hidden where it can be"] = (
                f"{100 * step.share:.2g}%, {100 * step.exposed_share:.2g}%"
            )
        return rows


def _step(step: Step) -> dict[str, float]:
    return {
        "sent_bytes": max(step.sent_bytes),
        "sent_bytes_of_all": sum(step.sent_bytes),
        "compute_s": step.compute_s,
        "communication_s": step.communication_s,
        "exposed_s": step.exposed_s,
        "share": step.share,
        "exposed_share": step.exposed_share,
    }


def forecasts(models: list[Any], tokens: int, ranks: int, *, link: str, flops: str, full: str) -> OverRanks:
    """Forecast a text of each model, before and after a plan.

    Raises:
        ValueError: a flag can't be read, or full layers can't be shared so.
    """
    if not 1 <= ranks <= AT_MOST:
        raise ValueError(f"inspect: ranks must be 1 to {AT_MOST}, got {ranks}")
    if full not in ("gather", "ulysses"):
        raise ValueError(f"inspect: full must be gather or ulysses, got {full!r}")
    rates: dict[str, Any] = dict(link=read_link(link), flops=read_flops(flops), full=full)
    found = {}
    for name, model in zip(("before", "after"), models, strict=False):
        parameters = sum(parameter.numel() for parameter in model.parameters())
        decoders = (decoder_of(model.config), decoder_of(model.config, training=True))
        serving, training = (forecast(d, tokens, ranks, parameters=parameters, **rates) for d in decoders)
        found[name] = (serving, training)
    return OverRanks(tokens, rates["link"], rates["flops"], full, found)


def read_link(text: str) -> float:
    """Bytes a second.

    Example:
        >>> read_link("400Gb/s"), read_link("45GB/s")
        (50000000000.0, 45000000000.0)
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGT]?)([bB])(?:/s)?", text.strip())
    number = float(match[1]) * PREFIXES[match[2]] / (8 if match[3] == "b" else 1) if match else 0.0
    if not number:
        raise ValueError(f"inspect: link must be bytes or bits a second such as 45GB/s or 400Gb/s, got {text!r}")
    return number


def read_flops(text: str) -> float:
    """Operations a second.

    Example:
        >>> read_flops("400T")
        400000000000000.0
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMGTP]?)(?:FLOP(?:/s|S)?)?", text.strip())
    number = float(match[1]) * PREFIXES[match[2]] if match else 0.0
    if not number:
        raise ValueError(f"inspect: flops must be operations a second such as 400T, got {text!r}")
    return number
