"""How good a checkpoint is: the records of an evaluation."""

from jaxmoe.evaluation.records import Evaluation, TextEvaluation

__all__ = ["Evaluation", "TextEvaluation"]
