"""Say in a stock architecture's config what a plan made of a model; changes with the windows that transformers has."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from longattn.hf.families import family_of
from longattn.hf.record import layer_patterns
from longattn.hf.stock_windows import parameters_of, with_windows
from longattn.legacy_keys import legacy_config_keys
from longattn.pattern import Pattern
from longattn.report import Change, Report, in_runs

__all__ = ["StockConfig", "stock_config"]

SHOWN = (
    "model_type",
    "architectures",
    "sliding_window",
    "layer_types",
    "use_sliding_window",
    "max_window_layers",
    "auto_map",
)
PROBE = "The quick brown fox, 1234 \u00e9\u4f60 <s>\n\tdef f(x):  return x"


@dataclass(frozen=True)
class StockConfig:
    """A checkpoint's config without longattn, and what it says otherwise than the one before.

    Args:
        fields: config.json.
        changes: what differs from the extended model's config.
        notes: what is left out, and what is there for older readers.
        proofs: what was looked at.
    """

    fields: dict[str, Any]
    changes: list[Change]
    notes: list[str]
    proofs: list[str]

    def report(self, extended: Report, undone: str | None) -> Report:
        """What extending and exporting together change.

        Args:
            extended: what extending alone changed.
            undone: what was checked of longattn's attention, which the checkpoint will not use.
        """
        changes = [
            change for change in extended.changes if change.what not in ("attn_implementation", "train_attention")
        ]
        return replace(
            extended,
            changes=[*changes, *self.changes],
            proofs=[*(proof for proof in extended.proofs if proof != undone), *self.proofs],
            notes=[*extended.notes, *self.notes],
        )

    def write(self, folder: Path) -> None:
        """Write config.json."""
        text = json.dumps(self.fields, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def settle_tokenizer(self, folder: Path, source: Path) -> None:
        """Save the tokenizer anew where it reads text otherwise under the new architecture.

        transformers chooses its class by `model_type`: what is a LlamaTokenizer beside a Llama is read from
        tokenizer.json alone beside a Mistral.
        """
        before = _tokenizer_of(source)
        if before is not None and not _same_tokens(before, _tokenizer_of(folder)):
            before.save_pretrained(folder)

    def check(self, folder: Path, source: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
        """Read a written checkpoint back: its config, and its tokenizer beside the one that it was made of.

        Args:
            folder: the new checkpoint.
            source: the old one.
            tokenizer: the one that was changed; None where it was not.

        Raises:
            RuntimeError: it says something else than was meant.
        """
        read = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_same(read, _read(self.fields))
        before = tokenizer or _tokenizer_of(source)
        if before is None:
            return
        if not _same_tokens(before, _tokenizer_of(folder)):
            raise RuntimeError(
                f"export: under model_type {read.model_type!r} the tokenizer reads text otherwise than it did"
            )


def stock_config(config: PreTrainedConfig) -> StockConfig:
    """Find the config under which stock transformers, without longattn, does what an extended model does.

    Rotary parameters are stock ones already. Full attention needs nothing, windows need an architecture that has them
    and the same weights: the model's own, or another one (Mistral's for a Llama). What was there for training is left
    out, and said to be.

    Args:
        config: of a served family, extended or not; it is not changed.

    Returns:
        The config's fields, with keys of transformers 4 beside those of version 5.

    Raises:
        ValueError: no stock config can say it: sinks, groups, windows of several sizes, or weights that no
            architecture with windows has.

    Example:
        >>> stock = stock_config(model.config)
        >>> stock.fields["model_type"], stock.fields["sliding_window"]
        ('mistral', 4096)
    """
    own = family_of(config, "export").patterns_of(config)
    patterns = layer_patterns(config) or own
    sizes = _window_sizes(patterns)
    plain = copy.deepcopy(config)
    if hasattr(plain, "longattn"):
        del plain.longattn
    target = plain if patterns == own else with_windows(plain, sizes)
    fields = target.to_diff_dict()
    legacy, unreadable = legacy_config_keys(fields)
    fields = {key: value for key, value in {**fields, **legacy}.items() if key != "attn_implementation"}
    read = _read(fields)
    _check_same(read, target)
    found = family_of(read, "export").windows_of(read)
    if found != sizes:
        raise RuntimeError(f"export: config.json reads back windows {found}, not {sizes}")
    parameters = parameters_of(plain)
    if target is not plain and parameters_of(read) != parameters:
        raise RuntimeError(f"export: a {read.model_type} has other weights than a {plain.model_type}")
    seen = in_runs([str(pattern) for pattern in patterns])
    return StockConfig(
        fields=fields,
        changes=_changes(config, target),
        notes=_notes(config, patterns, legacy, unreadable),
        proofs=[f"config.json reads back as {read.model_type}: {seen}, the same rope, {len(parameters)} parameters"],
    )


def _window_sizes(patterns: Sequence[Pattern]) -> list[int | None]:
    """Each layer's window, None where it sees all; refuses what no stock config can say."""
    for layer, pattern in enumerate(patterns):
        lacks = "groups" if pattern.kind == "group" else "sink tokens" if pattern.sinks else None
        if lacks is not None:
            raise ValueError(
                f"export: layer {layer} attends by {pattern}, but stock transformers has no {lacks}; export a plan of "
                "full layers and windows of one size, or write the checkpoint without export and load it with longattn"
            )
    sizes = sorted({pattern.size for pattern in patterns if pattern.kind == "window"})
    if len(sizes) > 1:
        raise ValueError(
            f"export: a stock config has one sliding_window for all its windows, got windows of {sizes} tokens"
        )
    if sizes == [1]:
        raise ValueError("export: a window must hold at least 2 tokens: transformers' cache keeps all keys of one of 1")
    return [pattern.size if pattern.kind == "window" else None for pattern in patterns]


def _tokenizer_of(source: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint; None where it has none that transformers reads without code from elsewhere."""
    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # the tokenizers library raises nothing more special
        return None


def _same_tokens(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase | None) -> bool:
    if other is None:
        return False
    return one.get_vocab() == other.get_vocab() and one(PROBE)["input_ids"] == other(PROBE)["input_ids"]


def _read(fields: dict[str, Any]) -> PreTrainedConfig:
    """What transformers makes of a config.json."""
    return CONFIG_MAPPING[fields["model_type"]].from_dict(copy.deepcopy(fields))


def _check_same(read: PreTrainedConfig, meant: PreTrainedConfig) -> None:
    for field in ("model_type", "rope_parameters", "max_position_embeddings", "vocab_size"):
        found, expected = getattr(read, field), getattr(meant, field)
        if (
            field == "rope_parameters"
        ):  # some families' keys of version 4 name the type so, Phi 3's leave the factor out
            left = ("type", "factor") if read.model_type == "phi3" else ("type",)
            found, expected = ({k: v for k, v in rope.items() if k not in left} for rope in (found, expected))
        if found != expected:
            raise RuntimeError(f"export: config.json reads back {field} {found}, not {expected}")


def _changes(config: PreTrainedConfig, target: PreTrainedConfig) -> list[Change]:
    changes = [Change(name, getattr(config, name, None), getattr(target, name, None)) for name in SHOWN]
    return [change for change in changes if change.before != change.after]


def _notes(
    config: PreTrainedConfig, patterns: Sequence[Pattern], legacy: dict[str, Any], unreadable: Sequence[str]
) -> list[str]:
    notes = []
    training = layer_patterns(config, "train_attention")
    if training is not None and training != list(patterns):
        listed = in_runs([str(pattern) for pattern in training])
        notes.append(f"train_attention, {listed}, is left out: a stock checkpoint has no training pattern")
    if hasattr(config, "longattn"):
        notes.append("config.longattn, which restore needs, is left out")
    notes.append(f"beside the keys of transformers 5 those of version 4: {', '.join(sorted(legacy))}")
    return [*notes, *unreadable]
