"""Kernels in Triton for CUDA devices, each the fast twin of plain code; imported where one is at hand."""
