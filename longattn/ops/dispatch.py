"""Which path serves a call: the compiled kernel or pure PyTorch; changes when that choice is made differently.

Each public op registers here once. Its kernel asks `choose`; `which` gives the same answer to people, with the reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = [
    "Which",
    "build_note",
    "choose",
    "compiled_error",
    "compiled_module",
    "debug",
    "debugging",
    "force",
    "implement",
    "library",
    "register",
    "registered",
    "which",
]

OLDEST_TORCH = (2, 10)
REBUILD = "pip install --no-build-isolation --no-deps --force-reinstall ."


def _require_torch(version: str) -> None:
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise ImportError(
            f"longattn needs torch {oldest} or newer, found {version}; to mend it: "
            f'pip install "torch>={oldest}", then, in the longattn sources: {REBUILD}'
        )


_require_torch(torch.__version__)

# Every schema of torch.ops.longattn is defined on this handle, whether or not anything was compiled.
library = torch.library.Library("longattn", "DEF")


def _load_compiled() -> tuple[ModuleType | None, str | None]:
    """Import longattn._C: (module, None), (None, None) where none was built, (None, error) where it is broken."""
    if importlib.util.find_spec("longattn._C") is None:
        return None, None
    try:
        return importlib.import_module("longattn._C"), None
    except (ImportError, OSError) as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(
            f"longattn: the compiled kernels do not load with torch {torch.__version__} ({text}); CPU tensors take the "
            f"pure-PyTorch path, CUDA tensors are refused. To mend it, in the longattn sources: {REBUILD}",
            stacklevel=2,
        )
        return None, text


_module, _error = _load_compiled()


def compiled_module() -> ModuleType | None:
    """The compiled module `longattn._C`, or None."""
    return _module


def compiled_error() -> str | None:
    """Why the compiled module, though it is there, failed to import; None where it loaded or was never built."""
    return _error


def build_note() -> dict[str, str | None]:
    """Why setup.py compiled nothing ("reason", None where it did) and nothing for CUDA ("cuda")."""
    note = Path(__file__).parents[1] / "_build.json"
    if note.is_file():
        return json.loads(note.read_text(encoding="utf-8"))
    reason = "the package was not installed by pip, so its build left no note"
    return {"reason": reason, "cuda": reason}


@dataclass(frozen=True)
class Which:
    """The path that a call takes ("compiled" or "pure") and why."""

    path: Literal["compiled", "pure"]
    reason: str


@dataclass(frozen=True)
class _Op:
    name: str
    prepare: Callable[..., tuple[Any, ...]]
    why_not_compiled: Callable[..., str | None]
    private: str
    example: Callable[[torch.device, torch.dtype], tuple[Any, ...]] | None
    kernel_note: Callable[..., str | None] | None


_ops: dict[str, _Op] = {}
_forced: ContextVar[Literal["pure", "compiled"] | None] = ContextVar("longattn_forced", default=None)
_debugging: ContextVar[bool] = ContextVar("longattn_debugging", default=False)
_warned: set[tuple[str, str]] = set()
_warned_lock = threading.Lock()


def register(
    name: str,
    *,
    prepare: Callable[..., tuple[Any, ...]],
    why_not_compiled: Callable[..., str | None],
    private: str,
    example: Callable[[torch.device, torch.dtype], tuple[Any, ...]] | None = None,
    kernel_note: Callable[..., str | None] | None = None,
) -> None:
    """Make a public op known to `choose`, `which` and `longattn doctor`.

    Args:
        name: the public op, e.g. "apply_rope".
        prepare: the public function's arguments -> the torch op's, checks included.
        why_not_compiled: the torch op's arguments -> None where the compiled kernel serves this call, else a short
            reason. It sees only calls on devices for which the kernel was compiled.
        private: the op that the compiled module implements, e.g. "_rope_fwd".
        example: (device, dtype) -> public arguments of a small typical call, for `longattn doctor`.
        kernel_note: the torch op's arguments -> which of several compiled kernels serves them, where that is not plain.
    """
    _ops[name] = _Op(name, prepare, why_not_compiled, private, example, kernel_note)


def registered() -> dict[str, Callable[[torch.device, torch.dtype], tuple[Any, ...]]]:
    """The public ops that give an example call, by name."""
    return {op.name: op.example for op in _ops.values() if op.example is not None}


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """Make one Python function the CPU and the CUDA kernel of an op."""
    for key in ("CPU", "CUDA"):
        library.impl(name, kernel, key)


def _device_of(args: tuple[Any, ...]) -> torch.device:
    return next(arg.device for arg in args if isinstance(arg, Tensor))


def _why_pure(op: _Op, args: tuple[Any, ...], device: torch.device) -> str | None:
    """Why the compiled kernel can't serve this call; None where it can."""
    if _error is not None:
        return f"the compiled kernels do not load: {_error}"
    if _module is None:
        return f"nothing was compiled: {build_note()['reason']}"
    if device.type not in ("cpu", "cuda"):
        return f"no kernel is written for {device.type} tensors"
    private = f"longattn::{op.private}"
    if not torch._C._dispatch_has_kernel(private) or not torch._C._dispatch_has_kernel_for_dispatch_key(
        private, device.type.upper()
    ):
        return f"this build has no {device.type.upper()} kernel for {op.name}"
    return op.why_not_compiled(*args)


def _decide(op: _Op, args: tuple[Any, ...]) -> Which:
    forced = _forced.get()
    if forced == "pure":
        return Which("pure", "forced")
    device = _device_of(args)
    reason = _why_pure(op, args, device)
    if reason is None:
        return Which("compiled", "forced" if forced else f"the compiled {device.type.upper()} kernel serves this call")
    if forced == "compiled":
        raise RuntimeError(f"{op.name}: compiled was forced, but the compiled kernel can't serve this call: {reason}")
    if _error is not None and device.type == "cuda":
        raise RuntimeError(
            f"{op.name}: {reason}; CUDA tensors are refused rather than served slowly. To mend it, in the longattn "
            f"sources: {REBUILD}; to take the slow path all the same: longattn.force('pure')"
        )
    return Which("pure", reason)


def choose(name: str, *args: Any) -> bool:
    """Pick the path of one call, inside an op's kernel: True for compiled, False for pure.

    Warns once per reason where CUDA tensors take the pure path.

    Args:
        name: the public op.
        args: the torch op's arguments.

    Raises:
        RuntimeError: compiled is forced and can't serve the call, or CUDA tensors meet a compiled module that does not
            load.
    """
    choice = _decide(_ops[name], args)
    if choice.path == "compiled":
        return True
    if choice.reason != "forced" and _device_of(args).type == "cuda":
        with _warned_lock:
            seen = (name, choice.reason) in _warned
            _warned.add((name, choice.reason))
        if not seen:
            warnings.warn(f"{name}: CUDA tensors take the slow pure-PyTorch path: {choice.reason}", stacklevel=2)
    return False


def which(op: Callable[..., Any] | str, /, *args: Any, **kwargs: Any) -> Which:
    """Say which path a call would take, and why, without running it.

    Args:
        op: a public function such as `longattn.apply_rope`, or its name.
        args: the call's arguments, as for the function itself.
        kwargs: likewise.

    Raises:
        ValueError: `op` is no op of longattn, or the call's arguments are not valid.

    Example:
        >>> x, table = torch.randn(1, 2, 4, 8), torch.ones(4, 4)
        >>> with force("pure"):
        ...     which("apply_rope", x, x, table, table)
        Which(path='pure', reason='forced')
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    if name not in _ops:
        raise ValueError(f"which: op must be one of {', '.join(sorted(_ops))}, got {name}")
    known = _ops[name]
    prepared = known.prepare(*args, **kwargs)
    decided = _decide(known, prepared)
    note = known.kernel_note(*prepared) if known.kernel_note and decided.path == "compiled" else None
    return decided if note is None else Which(decided.path, f"{decided.reason}: {note}")


@contextlib.contextmanager
def force(path: Literal["pure", "compiled"]) -> Iterator[None]:
    """Make every op take one path inside a `with` block, on this thread (and task) only.

    Backward passes of CUDA tensors run on threads of autograd's own, which do not see it.

    Args:
        path: "pure", or "compiled", which raises where no compiled kernel serves a call.
    """
    if path not in ("pure", "compiled"):
        raise ValueError(f"force: path must be 'pure' or 'compiled', got {path!r}")
    token = _forced.set(path)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def debug() -> Iterator[None]:
    """Check the values of index tensors on every device inside a `with` block, at the cost of synchronising."""
    token = _debugging.set(True)
    try:
        yield
    finally:
        _debugging.reset(token)


def debugging() -> bool:
    """Whether the values of index tensors are checked on every device."""
    return _debugging.get()
