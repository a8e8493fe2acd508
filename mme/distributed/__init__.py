"""Everything that involves several processes: groups, sharded tables, the DeepSpeed engine, experts, checkpoints."""
