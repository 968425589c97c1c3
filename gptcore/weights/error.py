"""The error of everything that reads weights."""


class WeightsError(ValueError):
    """Weights or a configuration that are missing, damaged, or of another model; names the file and what is wrong."""
