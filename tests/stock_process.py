"""Checkpoints run by a process that never imports longattn, and what it makes of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

LENGTH, NEW = 80, 12  # both beyond the windows; the text is longer than the tiny models' 64 tokens
SCRIPT = """
import sys, warnings
import torch, transformers
warnings.simplefilter("error", FutureWarning)
transformers.utils.logging.disable_progress_bar()
ids, new, *folders = sys.argv[1:]
ids = torch.load(ids)
for folder in folders:
    transformers.utils.logging.set_verbosity_warning()
    transformers.AutoTokenizer.from_pretrained(folder)
    capped = getattr(transformers.AutoConfig.from_pretrained(folder), "attn_logit_softcapping", None)
    given = {"attn_implementation": "eager"} if capped else {}  # before 5.21 sdpa took such models and left the cap out
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **given).eval()
    transformers.utils.logging.set_verbosity_error()  # the text is longer than the model was made for
    with torch.no_grad():
        logits = model(ids).logits
        texts = model.generate(ids, max_new_tokens=int(new), do_sample=False, eos_token_id=63)
    torch.save((logits, texts), folder + ".pt")
assert not any(name.partition(".")[0] == "longattn" for name in sys.modules), "longattn was imported"
"""


def token_ids() -> Tensor:
    return torch.randint(3, 60, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def run_without_longattn(folders: Sequence[Path], scratch: Path) -> str:
    """Write each folder's logits and greedy texts beside it; returns what transformers had to complain of."""
    torch.save(token_ids(), scratch / "ids.pt")
    arguments = [str(scratch / "ids.pt"), str(NEW), *(str(folder) for folder in folders)]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, cwd=scratch)
    assert done.returncode == 0, done.stderr
    return done.stderr


def assert_same_model(with_longattn: Path, stock: Path, tolerance: float = 5e-6) -> None:
    """Logits that differ by float32's rounding, and the same texts."""
    model = AutoModelForCausalLM.from_pretrained(with_longattn, dtype=torch.float32).eval()
    ids = token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        texts = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=63)
    found, found_texts = torch.load(stock.with_name(f"{stock.name}.pt"))
    error = float((found - expected).norm() / expected.norm())
    assert error < tolerance, f"relative error {error:.1e}"
    assert torch.equal(found_texts, texts)
