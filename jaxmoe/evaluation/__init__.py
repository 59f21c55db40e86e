"""How good a checkpoint is: perplexity, distance from the original, and how it goes on."""

from jaxmoe.evaluation.checkpoints import evaluate
from jaxmoe.evaluation.records import Continuation, Evaluation, TextEvaluation

__all__ = ["Continuation", "Evaluation", "TextEvaluation", "evaluate"]
