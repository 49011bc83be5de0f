"""The one exception a user is meant to read: what is wrong, with which value, and the way out."""


class RunError(ValueError):
    """A run cannot start or go on for a reason that its user can change; shown without a traceback."""


class DataError(RunError):
    """Data that is missing, damaged or not what was asked for; the message names it and the way out."""
