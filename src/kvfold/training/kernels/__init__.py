"""Device code of training; the pieces that entries are made of are those of backend_triton/kernels."""
