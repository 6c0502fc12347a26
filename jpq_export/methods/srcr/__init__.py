"""SrCr: which mix of sparsity and bits keeps most at an equal theoretical compression rate (arXiv 2505.07289)."""
