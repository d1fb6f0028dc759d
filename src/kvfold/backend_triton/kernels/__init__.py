"""Device code only: Triton kernels and their parts. DESIGN.md has the rules they follow."""
