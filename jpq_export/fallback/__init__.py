"""Decoders of other families, through transformers' own code and torch.onnx.export: no pruning, no search."""
