"""Calls of public functions as earlier versions had them: the error names the call of today."""

import pytest

import jaxmoe
from jaxmoe.data import demo_checkpoint, demo_texts


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: jaxmoe.calibrate("model", "windows"), "missing a required .*'text'; call jaxmoe.calibrate"),
        (lambda: jaxmoe.evaluate("model", "windows"), "too many positional arguments; call jaxmoe.evaluate"),
        (lambda: jaxmoe.compare("model", "report", texts=[]), "'methods'; call jaxmoe.compare"),
        (lambda: jaxmoe.recover("model", "out", [], sets=[]), "too many .*; call jaxmoe.recover"),
        (lambda: jaxmoe.recover(demo_checkpoint(), "out", text=demo_texts(), sets=[]), "sets; call .*learning_rate"),
    ],
)
def test_the_call_of_today_is_named(call, words):
    with pytest.raises(TypeError, match=words):
        call()
