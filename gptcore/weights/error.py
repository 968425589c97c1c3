"""The error that reading or writing weights raises."""


class WeightsError(ValueError):
    """Weights or a configuration are missing, damaged, or of another model; names the file and what is wrong."""
