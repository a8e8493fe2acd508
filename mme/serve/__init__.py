"""Recommendations over HTTP: `mme serve`."""
