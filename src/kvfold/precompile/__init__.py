"""Compiling before the first call: in this process, or to files for a GPU that need not be there."""
