"""The `jpq::` operators as Triton kernels: torch tensors in and out, on a CUDA device.

weight.py          the weight on the device, and how its rows are read
unpack.py          packed codes to numbers inside a kernel
low_bit_matmul.py  Y = X · dequantize(W)ᵀ (+ bias): few rows (decode) and many rows (prefill)
low_bit_gather.py  rows of dequantize(W): an embedding

Meaning: `jpq_export/numerics/reference.py`; bit layout: `jpq_export/numerics/packing.py`.
"""
