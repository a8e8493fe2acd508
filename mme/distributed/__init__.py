"""What crosses processes: groups, sharded item tables, the DeepSpeed engine, expert routing and checkpoints."""
