"""What calibration refuses, as types: each message is one sentence that names the value and what to do."""


class CalibrationError(ValueError):
    """Calibration or evaluation cannot go on with what it was given."""


class OptionError(CalibrationError):
    """What was asked for cannot be: by itself, or of this model or machine."""


class CorpusError(CalibrationError):
    """The text to calibrate on is missing, unreadable, unreachable or too short."""
