"""Language models on fused kernels: models, tokenizers, training, generation.

>>> import gptcore
>>> model = gptcore.GPT(gptcore.GPTConfig.preset("tiny", vocab_size=512))
"""

from gptcore.models import GPT, GPTConfig
from gptcore.text import Tokenizer, get_tokenizer

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "Tokenizer", "__version__", "get_tokenizer"]
