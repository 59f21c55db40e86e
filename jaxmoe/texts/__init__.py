"""Texts: from files to windows of tokens, the same way for calibration and for evaluation."""

from jaxmoe.texts.instructions import Dialogue, read_dialogues
from jaxmoe.texts.packing import Document, Rows, pack
from jaxmoe.texts.reading import Paths, Text, paths, read_texts
from jaxmoe.texts.spelling import Speller, instruction_documents, spell, speller
from jaxmoe.texts.tokenizer import Tokenizer, check_same
from jaxmoe.texts.tokenizer_files import tokenizer_fingerprint
from jaxmoe.texts.windows import Tokens, Windows, encode_documents, text_windows, tokenize, window_length, windows

__all__ = [
    "Dialogue",
    "Document",
    "Paths",
    "Rows",
    "Speller",
    "Text",
    "Tokenizer",
    "Tokens",
    "Windows",
    "check_same",
    "encode_documents",
    "instruction_documents",
    "pack",
    "paths",
    "read_dialogues",
    "read_texts",
    "spell",
    "speller",
    "text_windows",
    "tokenize",
    "tokenizer_fingerprint",
    "window_length",
    "windows",
]
