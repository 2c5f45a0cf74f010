"""`python -m benchmarks.absorbed_decode`: the decode kernels beside what the chip can do."""
