"""Fuxi-MME as code for one device; distributed components are passed in."""
