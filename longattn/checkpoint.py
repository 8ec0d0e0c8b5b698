"""Change a checkpoint on disk and write the new one, whatever its size; changes with what a checkpoint folder holds."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longattn.checkpoint_source import (
    GENERATION_CONFIG,
    TOKENIZER_CONFIG,
    check_tensors,
    check_tokenizer,
    files_beside_weights,
    load_tokenizer,
    materialise_embeddings,
    model_without_weights,
    read_config,
    read_json,
    source_folder,
)
from longattn.legacy_keys import legacy_tokenizer_config
from longattn.model_card import write_model_card
from longattn.part_folder import whole_or_absent
from longattn.pickled_shards import open_weights
from longattn.plan import Plan
from longattn.report import Change, Report
from longattn.shards import Progress, Shards

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from longattn.export import StockConfig

__all__ = ["extend_checkpoint", "preview_checkpoint"]

# What a tokenizer that was changed says in tokenizer.json alone.
STALE_TOKENIZER_FILES = ("special_tokens_map.json", "added_tokens.json")


def extend_checkpoint(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    plan: Plan | None,
    *,
    export: Literal["stock"] | None = None,
    allow_pickle: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Change a checkpoint by a plan and write the new one to another folder.

    The model is built without weights, only the embeddings are read where tokens are added, and all other tensors are
    copied as bytes, so that a checkpoint larger than the memory passes. The new folder appears whole or not at all, and
    the old one is only read.

    Args:
        src: a folder with a transformers checkpoint, or the id of a model on the Hub.
        dst: the folder to write; it must not exist, nor lie in `src`.
        plan: what to change; None only where the checkpoint is just exported.
        export: "stock" writes a checkpoint that loads in transformers without longattn, as `longattn.export` says.
        allow_pickle: read weights that `torch.save` pickled (pytorch_model.bin) where there are no safetensors: tensors
            alone, nothing that the pickle would run. They are written as safetensors.
        progress: called with the name of a tensor that is being written, the bytes written so far, and those in all.

    Returns:
        What changed, and what was checked.

    Raises:
        FileExistsError: `dst` exists.
        OSError: a file can't be read or written, or the Hub can't be reached.
        ValueError: `dst` is in `src`; the checkpoint is damaged, quantised or pickled; stock transformers can't
            say what is to be exported; or as `longattn.extend`.

    Example:
        >>> plan = longattn.Plan(rope={"rope_type": "yarn", "factor": 8.0})
        >>> report = extend_checkpoint("Llama-2-7b", "Llama-2-7b-32k", plan)
    """
    source, target = source_folder(src, allow_pickle), Path(dst).expanduser().absolute()
    if os.path.lexists(target):
        raise FileExistsError(f"extend: DST {dst} exists; give the name of a new folder")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"extend: DST {dst} must not lie in SRC {src}, which is left as it is")
    changed = _Changed.of(source, plan, export, allow_pickle)
    try:
        with whole_or_absent(target) as part:
            needed, free = changed.num_bytes(), shutil.disk_usage(part).free
            if needed > free:
                raise OSError(f"{needed / 2**30:.2f} GiB are needed, the disk has {free / 2**30:.2f} GiB left")
            changed.write(part, progress)
            base_model = None if Path(src).expanduser().is_dir() else str(src)
            write_model_card(part, source, plan, changed.report, name=target.name, base_model=base_model)
            changed.check_written(part)
    except OSError as error:
        failed = type(error)(f"extend: DST {dst} was not written: {error}")
        failed.errno = error.errno
        raise failed from error
    return changed.report


def preview_checkpoint(
    src: str | os.PathLike[str],
    plan: Plan | None,
    *,
    export: Literal["stock"] | None = None,
    allow_pickle: bool = False,
) -> Report:
    """Say what `extend_checkpoint` would change; reads and checks the checkpoint, and writes nothing.

    Args:
        src: as in `extend_checkpoint`.
        plan: what to change.
        export: as in `extend_checkpoint`.
        allow_pickle: as in `extend_checkpoint`.

    Returns:
        The report that `extend_checkpoint` would return.

    Raises:
        OSError, ValueError: as `extend_checkpoint`.

    Example:
        >>> print(preview_checkpoint("Llama-2-7b", longattn.Plan(rope={"rope_type": "yarn", "factor": 8.0})))
    """
    return _Changed.of(source_folder(src, allow_pickle), plan, export, allow_pickle).report


@dataclass(frozen=True)
class _Changed:
    """A checkpoint and what a plan has made of its parts, nothing written yet."""

    source: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    shards: Shards
    replaced: dict[str, Tensor]
    new_generation: dict[str, Any]
    new_length: int | None
    report: Report
    stock: StockConfig | None

    @classmethod
    def of(cls, source: Path, plan: Plan | None, export: str | None, allow_pickle: bool) -> _Changed:
        import longattn.surgery
        from longattn.hf.families import family_of

        if export not in (None, "stock"):
            raise ValueError(f"extend: export must be 'stock' or None, got {export!r}")
        stored_config = read_config(source)
        family_of(stored_config, "extend")
        shards = open_weights(source, allow_pickle)
        model = model_without_weights(stored_config, source, sum(1 for _ in shards))
        check_tensors(model, shards)
        tokenizer, homes = None, {}
        if plan is not None and plan.tokens is not None:
            tokenizer = load_tokenizer(source)
            check_tokenizer(tokenizer, model)
            homes = materialise_embeddings(model, shards)
        config = model.config
        length, generation = config.max_position_embeddings, _as_dict(model.generation_config)
        exported = plan is None and export is not None
        report = Report() if exported else longattn.surgery.extend(model, tokenizer, plan)  # type: ignore[arg-type]
        new_length = config.max_position_embeddings if config.max_position_embeddings != length else None
        if new_length is not None:
            report = _follow_length(report, source, config, tokenizer, length)
        stock = None
        if export is not None:
            from longattn.export import stock_config
            from longattn.hf.proofs import check_attention
            from longattn.hf.record import layer_patterns

            stock = stock_config(config)
            report = stock.report(report, None if layer_patterns(config) is None else check_attention(model))
        return cls(
            source=source,
            model=model,
            tokenizer=tokenizer,
            shards=shards,
            replaced={name: getattr(module, attribute).detach() for name, (module, attribute) in homes.items()},
            new_generation={
                key: value for key, value in _as_dict(model.generation_config).items() if generation.get(key) != value
            },
            new_length=new_length,
            report=report,
            stock=stock,
        )

    def num_bytes(self) -> int:
        """What `write` will write, but for a few kilobytes."""
        others = sum((self.source / path).stat().st_size for path in files_beside_weights(self.source))
        return self.shards.num_bytes(self.replaced) + others

    def write(self, folder: Path, progress: Progress | None) -> None:
        if self.stock is None:
            self.model.config.save_pretrained(folder)
        else:
            self.stock.write(folder)
        self._write_generation_config(folder)
        if self.tokenizer is not None:
            _save_tokenizer(self.tokenizer, folder)
        for path in files_beside_weights(self.source):
            target = folder / path
            if target.exists() or (self.tokenizer is not None and path.name in STALE_TOKENIZER_FILES):
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self.source / path, target)
        if self.stock is not None and self.tokenizer is None:
            self.stock.settle_tokenizer(folder, self.source)
        tokenizer_config = folder / TOKENIZER_CONFIG
        if self.tokenizer is None and self.new_length is not None and tokenizer_config.is_file():
            fields = {**read_json(tokenizer_config), "model_max_length": self.new_length}
            _write_json(tokenizer_config, fields)
        if self.stock is not None and tokenizer_config.is_file():
            _write_json(tokenizer_config, legacy_tokenizer_config(read_json(tokenizer_config)))
        self.shards.write(folder, self.replaced, progress)

    def _write_generation_config(self, folder: Path) -> None:
        """Only what changed is written anew: transformers refuses to save some configs that it loads (Llama 2's)."""
        if not self.new_generation or self.model.generation_config is None:
            return
        stored = self.source / GENERATION_CONFIG
        if stored.is_file():
            _write_json(folder / GENERATION_CONFIG, {**read_json(stored), **self.new_generation})
        else:
            self.model.generation_config.save_pretrained(folder)

    def check_written(self, folder: Path) -> None:
        """Read back what the new folder says about itself."""
        from transformers import AutoConfig, AutoTokenizer

        Shards.open(folder)
        if self.stock is not None:
            self.stock.check(folder, self.source, self.tokenizer)
            return
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        for field in ("rope_parameters", "max_position_embeddings", "vocab_size"):
            if getattr(config, field) != getattr(self.model.config, field):
                raise RuntimeError(f"extend: config.json reads back another {field}, {getattr(config, field)}")
        if self.tokenizer is not None:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            if tokenizer.get_vocab() != self.tokenizer.get_vocab():
                raise RuntimeError("extend: the tokenizer reads back other tokens than were saved")


def _save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises nothing more special where it can't write
        raise OSError(f"the tokenizer can't be saved: {error}") from error


def _as_dict(generation_config: Any) -> dict[str, Any]:
    return {} if generation_config is None else generation_config.to_dict()


def _write_json(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _follow_length(
    report: Report,
    source: Path,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    old_length: int,
) -> Report:
    """Let the tokenizer's length follow the model's, also where it is not loaded, or has no limit."""
    from longattn.hf.lengths import TOKENIZER_LENGTH, has_limit, keep_tokenizer_length

    length = config.max_position_embeddings
    if tokenizer is not None:
        before, tokenizer.model_max_length = tokenizer.model_max_length, length
    elif (source / TOKENIZER_CONFIG).is_file():
        before = read_json(source / TOKENIZER_CONFIG).get("model_max_length")
    else:
        return report
    if before == length or any(change.what == TOKENIZER_LENGTH for change in report.changes):
        return report
    before = before if has_limit(before) else None
    keep_tokenizer_length(config, before, old_length)
    return replace(report, changes=[*report.changes, Change(TOKENIZER_LENGTH, before, length)])
