"""Hyper-parameter search: `mme tune`."""
