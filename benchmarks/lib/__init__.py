"""What the benchmarks share: cases, timer, byte counts, results."""
