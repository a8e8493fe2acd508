"""Hyper-parameter search for `mme tune`."""
