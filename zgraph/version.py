"""The version of zgraph."""

__version__ = "0.1.0"
