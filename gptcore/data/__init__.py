"""Text to training data: reading a corpus, token files, and ``prepare``, which turns one into the other."""
