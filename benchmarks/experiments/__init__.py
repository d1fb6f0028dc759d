"""Kernels that only answer a question; kvfold does not use them."""
