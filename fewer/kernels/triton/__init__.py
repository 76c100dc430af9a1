"""Triton kernels for NVIDIA GPUs. Each also runs in Triton's interpreter on the CPU, where the tests check it."""
