"""Linear layers, and what stands between them, for the processor at hand: cpu/ in C, cuda/ in CUDA C++."""
