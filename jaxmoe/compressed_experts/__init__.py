"""Compressed Experts: fewer experts run for every token, and small vectors stand in for the others."""

from jaxmoe.compressed_experts.plan import MainPlan, make_main_plan
from jaxmoe.compressed_experts.run import compress_experts
from jaxmoe.compressed_experts.settings import METHOD, MainMethod, Settings

__all__ = ["METHOD", "MainMethod", "MainPlan", "Settings", "compress_experts", "make_main_plan"]
