"""Attention on the CPU: C++ sources, how they are compiled, and how a process calls them."""
