"""Weights from and to other implementations."""
