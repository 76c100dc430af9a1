"""Pure functions on tensors; each has a torch reference and fast variants for CPU and CUDA."""
