"""Change a loaded model by a plan, all of it or nothing, prove that it took effect, and put it back."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import longattn.hf  # noqa: F401  (registers the attention that a plan asks for)
from longattn.hf.families import Family, family_of
from longattn.hf.fused_rope import check_stock_rope_fits, has_fused_rope, use_stock_rope
from longattn.hf.lengths import follow_length, restore_tokenizer_length
from longattn.hf.proofs import check_attention, check_tokens
from longattn.hf.record import IMPLEMENTATION, VERSION, as_fields, layer_patterns, original_fields, read_record
from longattn.hf.rope import check_rotary_modules, head_dim_of, kept_ropes, rebuild_rotary_modules, rope_fields
from longattn.hf.undo import unchanged_on_error
from longattn.pattern import Pattern
from longattn.plan import Plan
from longattn.report import Change, Report, in_runs
from longattn.rope_plan import resolve_rope
from longattn.vocab import TokenPlan, prepare_tokens
from longattn.vocab_plan import token_fields
from longattn.wrappers import check_model

__all__ = ["extend", "restore"]

STOCK_IMPLEMENTATIONS = ("sdpa", "eager")
PARTS = ("attention", "train_attention")


def extend(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: Plan) -> Report:
    """Change a model's rotary embedding, length, attention patterns and vocabulary in place, as a plan says.

    All of the plan is checked before anything changes, and on any error model, configs and tokenizer are as they were.
    What was changed is looked at again afterwards. `config.longattn` keeps the plan and what `restore` needs.

    Args:
        model: a causal decoder of a served family; its weights may be on the meta device where its embeddings are not.
        tokenizer: the model's own; may be None where no token is added.
        plan: what to change.

    Returns:
        What changed, and what was checked.

    Raises:
        TypeError: an argument is of another type.
        ValueError: the family is not served, or the plan contradicts itself, the model, or changes nothing.
        RuntimeError: a change did not take effect.

    Example:
        >>> report = longattn.extend(model, tokenizer, longattn.Plan(rope={"rope_type": "yarn", "factor": 8.0}))
    """
    check_model("extend", model)
    if not isinstance(plan, Plan):
        raise TypeError(f"extend: plan must be a longattn.Plan, got {type(plan).__name__}")
    config = model.config
    family = family_of(config, "extend")
    family.check(config, "extend")
    rope = _rope_fields(config, family, plan)
    attention = _planned_attention(config, family, plan, rope)
    tokens = _planned_tokens(model, tokenizer, plan)
    changes: list[Change] = []
    proofs: list[str] = []
    with unchanged_on_error(model, tokenizer):
        _write_record(config, plan, [*rope, *([] if attention is None else ["attn_implementation"])])
        if rope:
            changes += _set_fields(config, rope)
            rebuild_rotary_modules(model)
            changes += follow_length(model, tokenizer, changes)
            proofs.append(check_rotary_modules(model))
        if attention is not None:
            changes += _hook(model, attention)
            proofs.append(check_attention(model))
        if tokens is not None:
            before = token_fields(model, tokens.report.roles)
            proofs.append(_add(tokens))
            after = token_fields(model, tokens.report.roles)
            changes += [Change(what, before[what], after[what]) for what in after if before[what] != after[what]]
    notes = kept_ropes(config, family) if rope or attention is not None else []
    return Report(changes, None if tokens is None else tokens.report, proofs, notes)


def restore(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> Report:
    """Put a model's rotary embedding, length and attention back as they were before its first plan; tokens stay.

    Works on a model that `longattn.extend` changed and on one loaded from a checkpoint saved after it, and undoes
    `longattn.hf.use_fused_rope`, also where there was no plan.

    Args:
        model: the changed model, in place.
        tokenizer: its own, whose `model_max_length` goes back too, in place, where the record of the plans has it; may
            be None, and then the report has a note of that length.

    Returns:
        What changed.

    Raises:
        TypeError: `model` is not a transformers model, or `tokenizer` no tokenizer.
        ValueError: no plan was applied to it, and it has no fused rope.

    Example:
        >>> longattn.restore(model, tokenizer).changes[0].what
        'rope_parameters'
    """
    check_model("restore", model)
    if tokenizer is not None and not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"restore: tokenizer must be a transformers tokenizer, got {type(tokenizer).__name__}")
    check_stock_rope_fits("restore", model)
    record = read_record(model.config)
    fused = has_fused_rope(model)
    if record is None and not fused:
        raise ValueError("restore: config.longattn is missing, so no plan was applied to this model")
    report = Report() if record is None else _undo_plans(model, tokenizer, record)
    if fused:
        use_stock_rope(model)
        report.changes.append(Change("rotary op", "longattn", "stock"))
    return report


def _undo_plans(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, record: dict[str, Any]) -> Report:
    """Put back what plans changed, all of it or nothing."""
    config = model.config
    family = family_of(config, "restore")
    fields = dict(record["original"])
    implementation = fields.pop("attn_implementation", None)
    patterns = [layer_patterns(config, part) for part in PARTS]
    proofs: list[str] = []
    with unchanged_on_error(model, tokenizer):
        del config.longattn
        changes = _set_fields(config, fields)
        changes += follow_length(model, None, changes)
        of_tokenizer, notes = restore_tokenizer_length(tokenizer, record)
        changes += of_tokenizer
        if "rope_parameters" in fields:
            rebuild_rotary_modules(model)
            proofs.append(check_rotary_modules(model))
        if implementation is not None:
            changes += _set_implementation(model, implementation)
            own = family.patterns_of(config)
            changes += [_pattern_change(part, before or own, own) for part, before in zip(PARTS, patterns, strict=True)]
    return Report([change for change in changes if change.before != change.after], None, proofs, notes)


@dataclass(frozen=True)
class _Attention:
    """The patterns that layers have and that a plan gives them."""

    before: dict[str, list[Pattern]]
    after: dict[str, list[Pattern]]


def _rope_fields(config: PreTrainedConfig, family: Family, plan: Plan) -> dict[str, Any]:
    """The config fields that a plan's rope and context change; empty where it has neither."""
    if plan.rope is None and plan.context is None:
        return {}
    serving = plan.attention_patterns(config.num_hidden_layers) or layer_patterns(config) or family.patterns_of(config)
    rotating = zip(serving, family.rotating_layers(config), strict=True)
    change = resolve_rope(
        config.rope_parameters,
        config.max_position_embeddings,
        plan.rope,
        plan.context,
        head_dim_of(config),
        length_only=all(pattern.kind != "full" for pattern, rotates in rotating if rotates),
    )
    return rope_fields(config, family, change)


def _planned_attention(config: PreTrainedConfig, family: Family, plan: Plan, rope: dict[str, Any]) -> _Attention | None:
    """The attention part of a plan, checked against the model; None where it has none."""
    if plan.attention is None and plan.train_attention is None:
        return None
    if config.output_attentions:
        raise ValueError("extend: config.output_attentions must be False: attention weights are never formed, got True")
    layers = config.num_hidden_layers
    own = family.patterns_of(config)
    before = {part: layer_patterns(config, part) or own for part in PARTS}
    serving = plan.attention_patterns(layers) or before["attention"]
    after = {
        "attention": serving,
        "train_attention": plan.train_patterns(layers) or serving,
    }
    length = rope.get("max_position_embeddings", config.max_position_embeddings)
    for pattern in (*after["attention"], *after["train_attention"]):
        if pattern.kind == "group" and pattern.size > length:
            raise ValueError(f"extend: a group must fit into the model's {length} tokens, got {pattern}")
    hooked = layer_patterns(config) is None or config._attn_implementation == IMPLEMENTATION
    if before == after and hooked and not rope and plan.tokens is None:
        listed = in_runs([str(pattern) for pattern in serving])
        raise ValueError(
            f"extend: the plan changes nothing: the layers attend by {listed} already; through longattn, where it "
            "is loaded with attn_implementation='longattn'"
        )
    return _Attention(before, after)


def _planned_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, plan: Plan) -> TokenPlan | None:
    """The new rows that a plan asks for, computed; None where it has no tokens."""
    if plan.tokens is None:
        return None
    if tokenizer is None:
        raise ValueError("extend: tokenizer must be given where the plan adds tokens, got None")
    return prepare_tokens(model, tokenizer, **plan.tokens)


def _add(tokens: TokenPlan) -> str:
    """Add new tokens and look at them; gives what was seen."""
    report = tokens.apply()
    try:
        return check_tokens(tokens.model, tokens.tokenizer, report)
    except BaseException:
        tokens.undo()
        raise


def _write_record(config: PreTrainedConfig, plan: Plan, fields: list[str]) -> None:
    """Note the plan, and of the fields that it changes the values that no earlier plan has noted."""
    earlier = read_record(config) or {}
    present = {name: _field(config, name) for name in fields}
    record = {
        **earlier,
        "version": VERSION,
        "plan": plan.to_dict(),
        "original": {**present, **original_fields(config)},
    }
    if earlier:
        record["earlier_plans"] = [*earlier.get("earlier_plans", []), earlier["plan"]]
    config.longattn = record


def _field(config: PreTrainedConfig, name: str) -> Any:
    if name == "attn_implementation":
        return config._attn_implementation
    return copy.deepcopy(getattr(config, name))


def _set_fields(config: PreTrainedConfig, fields: dict[str, Any]) -> list[Change]:
    changes = [Change(name, _field(config, name), value) for name, value in fields.items()]
    for name, value in fields.items():
        setattr(config, name, copy.deepcopy(value))
    return [change for change in changes if change.before != change.after]


def _hook(model: PreTrainedModel, attention: _Attention) -> list[Change]:
    """Give the layers their patterns: the record, which attention and caches read, and the implementation."""
    config = model.config
    config.longattn = {
        **config.longattn,
        **{part: [as_fields(p) for p in attention.after[part]] for part in PARTS},
    }
    changes = [_pattern_change(part, attention.before[part], attention.after[part]) for part in PARTS]
    changes = [change for change in changes if change.before != change.after]
    return changes + _set_implementation(model, IMPLEMENTATION)


def _pattern_change(part: str, before: list[Pattern], after: list[Pattern]) -> Change:
    return Change(part, [str(pattern) for pattern in before], [str(pattern) for pattern in after])


def _set_implementation(model: PreTrainedModel, name: str) -> list[Change]:
    before = model.config._attn_implementation
    # a model restored on another machine than the one that it was extended on may lack its first implementation, and
    # some families have no SDPA
    for candidate in (name, *STOCK_IMPLEMENTATIONS):
        with contextlib.suppress(ImportError, ValueError):
            model.set_attn_implementation(candidate)
            break
    after = model.config._attn_implementation
    return [] if before == after else [Change("attn_implementation", before, after)]
