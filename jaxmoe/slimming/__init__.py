"""Whole experts or channels removed: checkpoints of the original architecture, by methods of `methods.slimming`."""

from jaxmoe.slimming.plan import SlimPlan, make_slim_plan, unwritten
from jaxmoe.slimming.run import slim

__all__ = ["SlimPlan", "make_slim_plan", "slim", "unwritten"]
