"""What a changed model can do: perplexity under growing context, and finding things in long texts.

Needs torch; models and tokenizers are transformers'.
"""

from longattn.evaluate.losses import next_token_losses
from longattn.evaluate.perplexity import Score, SlidingScore, score_last, score_sliding, token_loss
from longattn.evaluate.retrieval import Cell, evaluate_retrieval, greedy
from longattn.evaluate.tasks import TASKS, MultiKey, Passkey, Question, Task
from longattn.evaluate.windows import ScoringWindow, encode, leading_tokens, scoring_windows, spread_ends, windows_at

__all__ = [
    "TASKS",
    "Cell",
    "MultiKey",
    "Passkey",
    "Question",
    "Score",
    "ScoringWindow",
    "SlidingScore",
    "Task",
    "encode",
    "evaluate_retrieval",
    "greedy",
    "leading_tokens",
    "next_token_losses",
    "score_last",
    "score_sliding",
    "scoring_windows",
    "spread_ends",
    "token_loss",
    "windows_at",
]
