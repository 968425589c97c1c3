"""Generation: sampling, decoding with a key/value cache, text from text, and chat (`gptcore.generate.chat`)."""

from gptcore.generate.decode import generate, generate_stream, pad_left
from gptcore.generate.sampling import Sampling, keep_likely, penalise
from gptcore.generate.text import generate_text, stream_text

__all__ = [
    "Sampling",
    "generate",
    "generate_stream",
    "generate_text",
    "keep_likely",
    "pad_left",
    "penalise",
    "stream_text",
]
