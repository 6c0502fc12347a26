"""QPruner (arXiv 2412.11629): pruning by Taylor importance, bits by mutual information and a Bayesian search."""
