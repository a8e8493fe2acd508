"""What watches, records and ends a run."""
