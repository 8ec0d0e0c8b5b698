"""The benchmark on a GPU: longattn beside windows of FlashAttention and cuDNN, FlexAttention, Triton rope, ceilings."""
