"""``torch.ops.softcap_runtime.attention``: the operator, and what torch asks of one: batching, sharding, FLOPs."""
