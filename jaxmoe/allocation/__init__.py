"""Exact integer budgets: who gets how many ranks, bases or channels, one rule in a file."""

from jaxmoe.allocation.bits import Choice, choose_bits, joined
from jaxmoe.allocation.importance import floor_ranks, ranks_by_importance
from jaxmoe.allocation.ladders import Ladder, allocate, allocate_counted, kept_fractions, reachable
from jaxmoe.allocation.shares import Shares, by_energy, by_loss, by_odds, share
from jaxmoe.allocation.spectral import water_fill
from jaxmoe.allocation.threshold import ranks_by_threshold

__all__ = [
    "Choice",
    "Ladder",
    "Shares",
    "allocate",
    "allocate_counted",
    "by_energy",
    "by_loss",
    "by_odds",
    "choose_bits",
    "floor_ranks",
    "joined",
    "kept_fractions",
    "ranks_by_importance",
    "ranks_by_threshold",
    "reachable",
    "share",
    "water_fill",
]
