"""Everything that depends on the version of torch, or on names of it that are not public."""
