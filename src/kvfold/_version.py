"""The version, which packaging and the command line read too."""

__version__ = "0.1.0"
