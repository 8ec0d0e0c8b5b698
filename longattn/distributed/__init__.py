"""Sequences longer than one device: context parallelism on torch.distributed."""

from longattn.distributed.attention import group_attention, window_attention

__all__ = ["group_attention", "window_attention"]
