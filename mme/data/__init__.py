"""From raw interactions to batches of jagged sequences."""
