"""From raw interactions to a training set: `mme prepare`."""
