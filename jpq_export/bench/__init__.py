"""How fast a bundle is on this machine, beside the original model's shapes in other runtimes. No torch."""
