"""longattn's attention and rotary op inside Hugging Face transformers; importing this module registers it there."""

from transformers import AttentionInterface, AttentionMaskInterface

from longattn.hf.attention import longattn_attention
from longattn.hf.bypass import warn_of_bypass
from longattn.hf.caches import register_caches
from longattn.hf.fused_rope import use_fused_rope
from longattn.hf.masks import longattn_mask
from longattn.hf.record import IMPLEMENTATION, save_implementation

__all__ = ["register", "use_fused_rope"]


def register() -> None:
    """Make `attn_implementation="longattn"` known to transformers, so that checkpoints with a pattern load.

    Importing `longattn.hf` calls it; calling it again changes nothing.
    """
    AttentionInterface.register(IMPLEMENTATION, longattn_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, longattn_mask)
    save_implementation()
    warn_of_bypass()
    register_caches()


register()
