"""Fuxi-MME as single-device code: what is distributed is handed in."""
