"""TOGA (arXiv 2606.07819): a hypernetwork learns pruning and two precisions together through the frozen model."""
