"""Starts training jobs on this node, through Slurm or on Kubernetes; checks nodes; predicts memory and step time."""
