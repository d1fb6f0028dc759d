"""Triton kernels; see DESIGN.md for the rules they follow."""
