"""Placeholder."""
def compress(*a): raise NotImplementedError
