"""From a training set to batches of jagged sequences."""
