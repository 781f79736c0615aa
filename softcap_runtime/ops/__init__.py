"""``torch.ops.softcap_runtime.attention``: the operator, and its rules for batching, sharding and FLOP counts."""
