"""GPU kernels written in Triton, for every CUDA GPU that it compiles for: the sources, and how they are launched."""
