"""Random statistics, and a record that they fit."""

import dataclasses

import numpy as np

from jaxmoe.calibration.record import Record, Source
from jaxmoe.calibration.statistics import FIELDS, LayerStatistics, kept
from jaxmoe.factors import LayerShape

SHAPE = LayerShape(experts=5, hidden=4, intermediate=3)
SHAPES = {1: SHAPE, 4: LayerShape(experts=2, hidden=4, intermediate=6)}
RECORD = Record(
    model="m",
    tokenizer="t",
    domains={"code": (Source("a", 2, 256, 7),), "web": (Source("b", 4, 256, 9),)},
    layers=SHAPES,
    gradients="sequence",
)


def random_record(seed, shape=SHAPE, moments="weighted", gradients=True):
    rng = np.random.default_rng(seed)
    arrays = {}
    for name in kept(shape, moments=moments, gradients=gradients):
        field = FIELDS[name]
        arrays[name] = (10 * rng.random(field.shape(shape))).astype(field.dtype)
    return LayerStatistics(shape=shape, tokens=7 + seed, sequences=2 + seed, **arrays)


def records(record=RECORD, seed=0):
    """Random statistics that fit a record."""
    found = {}
    for position, domain in enumerate(record.domains):
        found[domain] = {
            index: dataclasses.replace(
                random_record(100 * seed + 10 * position + index, shape, record.moments, record.gradients is not None),
                tokens=record.tokens(domain),
                sequences=record.sequences(domain),
            )
            for index, shape in record.layers.items()
        }
    return found
