"""Exact integer budgets: who gets how many ranks, bases or channels, one rule in a file."""

from jaxmoe.allocation.ladders import Ladder, allocate, common_fraction, reachable, share

__all__ = ["Ladder", "allocate", "common_fraction", "reachable", "share"]
