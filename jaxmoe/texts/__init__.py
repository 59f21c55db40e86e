"""Texts: from files to windows of tokens, the same way for calibration and for evaluation."""

from jaxmoe.texts.instructions import chat_template, paragraphs, read_dialogues, tokenize_dialogue
from jaxmoe.texts.packing import Document, Rows, pack
from jaxmoe.texts.reading import Text, read_texts
from jaxmoe.texts.tokenizer import Tokenizer, check_same, tokenizer_fingerprint
from jaxmoe.texts.windows import Tokens, Windows, text_windows, tokenize, window_length, windows

__all__ = [
    "Document",
    "Rows",
    "Text",
    "Tokenizer",
    "Tokens",
    "Windows",
    "chat_template",
    "check_same",
    "pack",
    "paragraphs",
    "read_dialogues",
    "read_texts",
    "text_windows",
    "tokenize",
    "tokenize_dialogue",
    "tokenizer_fingerprint",
    "window_length",
    "windows",
]
