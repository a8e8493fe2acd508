"""Starts the training job: on this node, through Slurm or on Kubernetes; checks the nodes; predicts memory and time."""
