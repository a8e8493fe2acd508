"""Profiles of training steps: time and memory by part."""
