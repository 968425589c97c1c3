"""Training data: reads a corpus of text, splits it, and encodes it into token files (``prepare``)."""
