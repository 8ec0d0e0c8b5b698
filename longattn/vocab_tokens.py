"""New tokens on the tokenizer's side: what may be added, adding it, and seeing that it is read back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "NewToken",
    "add_to",
    "existing_id",
    "new_tokens",
    "old_pieces",
    "replace_contents",
    "role_ids",
    "stage",
]

EXTRA = "extra_special_tokens"
# the text around a token in which it must be found again; spaces, because tokens can be asked to match whole words only
SENTENCE = "One two {} three."


@dataclass(frozen=True)
class NewToken:
    """A token to add: its text, how the tokenizer is to match it, and the role it is given, if any."""

    text: str
    added: AddedToken
    role: str | None = None


def new_tokens(
    tokens: Sequence[str | AddedToken] | Mapping[str, object], special: bool, roles: Sequence[str]
) -> list[NewToken]:
    """Read the argument `tokens` of `add_tokens`, in order, without a tokenizer."""
    from tokenizers import AddedToken

    if not isinstance(special, bool):
        raise TypeError(f"add_tokens: special must be a bool, got {special!r}")
    found = [
        NewToken(str(entry.content if isinstance(entry, AddedToken) else entry), _matching(entry, special), role)
        for role, entry in _entries(tokens, special, roles)
    ]
    if not found:
        raise ValueError("add_tokens: tokens must name at least one token, got none")
    seen = set()
    for token in found:
        if token.text in seen:
            raise ValueError(f"add_tokens: tokens must not repeat, got {token.text!r} twice")
        seen.add(token.text)
    return found


def _entries(tokens: object, special: bool, roles: Sequence[str]) -> list[tuple[str | None, object]]:
    """(role or None, entry) of each token, in order."""
    if isinstance(tokens, Sequence) and not isinstance(tokens, str):
        return [(None, entry) for entry in tokens]
    if not isinstance(tokens, Mapping):
        raise TypeError(f"add_tokens: tokens must be a list of tokens or a mapping from role to token, got {tokens!r}")
    if not special:
        raise ValueError("add_tokens: special must be True where tokens maps roles to tokens, got False")
    entries: list[tuple[str | None, object]] = []
    for role, entry in tokens.items():
        if role == EXTRA:
            if isinstance(entry, str) or not isinstance(entry, Sequence):
                raise TypeError(f"add_tokens: tokens[{EXTRA!r}] must be a list of tokens, got {entry!r}")
            entries += [(None, extra) for extra in entry]
        elif role in roles:
            entries.append((role, entry))
        else:
            raise ValueError(f"add_tokens: tokens must map roles, any of {', '.join([*roles, EXTRA])}, got {role!r}")
    return entries


def _matching(entry: object, special: bool) -> AddedToken:
    """A copy of an AddedToken, or the one that a plain text stands for; transformers may change those it is given."""
    from tokenizers import AddedToken

    if isinstance(entry, AddedToken):
        if entry.special and not special:
            raise ValueError(
                f"add_tokens: special must be True for a special AddedToken, got False for {entry.content!r}"
            )
        text, flags = (entry.content, {name: getattr(entry, name) for name in ("single_word", "lstrip", "rstrip")})
        added = AddedToken(text, special=special, normalized=entry.normalized, **flags)
    elif isinstance(entry, str):
        text, added = entry, AddedToken(entry, special=special, normalized=not special)
    else:
        raise TypeError(f"add_tokens: tokens must be texts or AddedToken, got {entry!r}")
    if not text:
        raise ValueError("add_tokens: tokens must not be empty, got ''")
    if special and not text.strip():
        raise ValueError(f"add_tokens: special tokens must hold more than whitespace, got {text!r}")
    return added


def old_pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids that a tokenizer cuts a text into, without special tokens and without the unknown token."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    unknown = tokenizer.unk_token_id if "unk_token" in tokenizer.special_tokens_map else None
    return [int(i) for i in ids if i != unknown]


def existing_id(tokenizer: PreTrainedTokenizerBase, text: str, vocab: Mapping[str, int]) -> int | None:
    """The id of a text that is one token already: an entry of the vocabulary, or its only piece, equal when decoded."""
    known = vocab.get(text)
    if known is not None:
        return known
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) == 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text:
        return int(ids[0])
    return None


def add_to(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[NewToken]) -> None:
    """Add tokens through transformers; special ones take their roles or join the extra special tokens."""
    fresh = [(token, _matching(token.added, token.added.special)) for token in tokens]
    plain = [added for _, added in fresh if not added.special]
    if plain:
        tokenizer.add_tokens(plain)
        return
    named: dict[str, str | AddedToken | Sequence[str | AddedToken]] = {}
    named.update({token.role: added for token, added in fresh if token.role is not None})
    extra = [added for token, added in fresh if token.role is None]
    if extra:
        named[EXTRA] = extra
    tokenizer.add_special_tokens(named, replace_extra_special_tokens=False)
    # tokenizers that put bos and eos around a text themselves keep the ids they were built with
    if any(getattr(tokenizer, f"add_{role}", False) for role in named) and hasattr(tokenizer, "update_post_processor"):
        tokenizer.update_post_processor()


def stage(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[NewToken], old_ids: Iterable[int]) -> list[int]:
    """Add tokens to a scratch copy of their tokenizer and see that each is read back; gives their ids."""
    old_roles = role_ids(tokenizer, [token.role for token in tokens if token.role is not None])
    add_to(tokenizer, tokens)
    taken = set(old_ids)
    ids = []
    for token in tokens:
        # a text that is not in the vocabulary gets None or the unknown token's id, which is taken
        (new,) = _ids(tokenizer, [token.text])
        if new is None or new in taken:
            raise ValueError(
                f"add_tokens: tokens must get ids of their own from the tokenizer, got {new} for {token.text!r}"
            )
        taken.add(new)
        ids.append(new)
    for token, new in zip(tokens, ids, strict=True):
        _check_read_back(tokenizer, token.text, new)
    _check_roles(tokenizer, old_roles)
    return ids


def role_ids(tokenizer: PreTrainedTokenizerBase, roles: Sequence[str]) -> dict[str, int]:
    """The ids of the tokens that have these roles now; roles that no token has are left out."""
    held = {role: token for role, token in tokenizer.special_tokens_map.items() if role in roles}
    return dict(zip(held, _ids(tokenizer, list(held.values())), strict=True))


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[int]:
    ids = tokenizer.convert_tokens_to_ids(texts)
    assert isinstance(ids, list)
    return ids


def _check_read_back(tokenizer: PreTrainedTokenizerBase, text: str, expected: int) -> None:
    sentence = SENTENCE.format(text)
    for where, scope in ((sentence, "inside a sentence"), (text, "alone")):
        ids = tokenizer(where, add_special_tokens=False, verbose=False)["input_ids"]
        if expected not in ids:
            raise ValueError(
                f"add_tokens: tokens must be read by the tokenizer, got {ids} for {where!r}, without the id {expected} "
                f"that {text!r} was given ({scope})"
            )
        decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.strip() not in decoded:
            raise ValueError(
                f"add_tokens: tokens must be decoded to themselves, got {decoded!r} for {where!r} ({scope})"
            )


def _check_roles(tokenizer: PreTrainedTokenizerBase, old_roles: Mapping[str, int]) -> None:
    """The tokens that the tokenizer puts around every text must be those that have the roles."""
    around = tokenizer("")["input_ids"]
    held = role_ids(tokenizer, tokenizer.SPECIAL_TOKENS_ATTRIBUTES).values()
    for role, old in old_roles.items():
        if old in around and old not in held:
            raise ValueError(
                f"add_tokens: tokens must not replace the {role} {tokenizer.convert_ids_to_tokens(old)!r}, which this "
                f"tokenizer's post-processor adds to every text by itself, got a new one"
            )


def replace_contents(tokenizer: PreTrainedTokenizerBase, by: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer what a copy of it was; tokenizers can't forget a token in place."""
    vars(tokenizer).clear()
    vars(tokenizer).update(vars(by))
