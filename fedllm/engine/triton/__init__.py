"""Kernels in Triton for CUDA devices; imported only where one is there. Each has a twin in torch."""
