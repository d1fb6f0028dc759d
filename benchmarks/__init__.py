"""Measurements of kvfold, and what makes the documents. Run from the repository root: `python -m benchmarks.run.decode`."""
