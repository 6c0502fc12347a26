"""Prove that a runtime computes what PyTorch computes."""
