"""How good a checkpoint is: perplexity, distance from the original, and how it goes on."""

from jaxmoe.evaluation.checkpoints import evaluate_checkpoint
from jaxmoe.evaluation.evaluate import evaluate
from jaxmoe.evaluation.records import Continuation, Evaluation, TextEvaluation

__all__ = ["Continuation", "Evaluation", "TextEvaluation", "evaluate", "evaluate_checkpoint"]
