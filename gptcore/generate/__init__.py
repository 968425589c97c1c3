"""Generation: sampling, decoding with a key/value cache, text from text, chat (`gptcore.generate.chat`), and the likelihood
of texts that others wrote."""

from gptcore.generate.decode import generate, generate_stream, pad_left, pad_right
from gptcore.generate.sampling import Sampling, keep_likely, penalise
from gptcore.generate.score import Request, Score, encode_pair, log_likelihoods
from gptcore.generate.text import generate_text, stream_text

__all__ = [
    "Request",
    "Sampling",
    "Score",
    "encode_pair",
    "generate",
    "generate_stream",
    "generate_text",
    "keep_likely",
    "log_likelihoods",
    "pad_left",
    "pad_right",
    "penalise",
    "stream_text",
]
