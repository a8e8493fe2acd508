"""Exact ranking, metrics and recommendations of a trained model."""
