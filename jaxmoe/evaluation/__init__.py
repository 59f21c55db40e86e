"""How good a checkpoint is: perplexity, distance from the original, and greedy continuations."""

from jaxmoe.evaluation.checkpoints import evaluate
from jaxmoe.report.evaluation_records import Continuation, Evaluation, TextEvaluation

__all__ = ["Continuation", "Evaluation", "TextEvaluation", "evaluate"]
