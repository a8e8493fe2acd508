"""Fuxi-MME: a sequential recommender with many item-embedding tables and a shared mixture-of-experts decoder."""

__version__ = "0.1.0"
