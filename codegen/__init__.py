"""Generated kernels: from a fused region to Triton source and its reference implementation."""
