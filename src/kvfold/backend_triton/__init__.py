"""The Triton backend on the host: which kernel a call gets, how it is compiled, and its launch."""
