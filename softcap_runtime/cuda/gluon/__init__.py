"""GPU kernels written in Gluon, for Hopper (sm_90): the sources, and the tile sizes that were measured."""
