"""Builds kernels before they are needed."""
