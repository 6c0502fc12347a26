"""Compress a language model for an edge device and prove that every runtime still computes it."""

__version__ = "0.1.0"
