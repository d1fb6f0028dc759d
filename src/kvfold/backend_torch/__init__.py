"""The torch backend: for CPUs, and for reading. Same results as the kernels up to fp32 rounding."""
