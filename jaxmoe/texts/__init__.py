"""Texts: from files to windows of tokens, the same way for calibration and for evaluation."""

from jaxmoe.texts.reading import Text, read_texts
from jaxmoe.texts.tokenizer import Tokenizer, tokenizer_fingerprint
from jaxmoe.texts.windows import Tokens, Windows, text_windows, tokenize, window_length, windows

__all__ = [
    "Text",
    "Tokenizer",
    "Tokens",
    "Windows",
    "read_texts",
    "text_windows",
    "tokenize",
    "tokenizer_fingerprint",
    "window_length",
    "windows",
]
