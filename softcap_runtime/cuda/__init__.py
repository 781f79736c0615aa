"""Kernels for NVIDIA's Hopper (compute capability 9.0), in Gluon; they need Triton to be built, and none to run."""
