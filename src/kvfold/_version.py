"""The version, which packaging and the command line read too."""

__version__ = "0.2.0"
