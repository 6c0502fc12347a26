"""The steps of `tools/gpu_check.py`, each run in a process of its own.

cases.py        random weights at awkward shapes, their meaning in fp64, how far a right kernel may be from it
correctness.py  every case through a set of kernels, each with twins that must fail
triton_set.py   the Triton kernels as such a set
cuda_set.py     the CUDA kernels: compiled for the GPU that is there, called through their C interface
sanitizer.py    compute-sanitizer over both; edges.cu is what it runs
speed.py        bytes a second against a copy, products a second against cuBLAS
decode.py       a real bundle through onnxruntime's CUDA provider
environment.py  the machine, as a report must name it
outcome.py      what a step says at its end
report.py       JSON and Markdown

Nothing but Python, numpy, torch and Triton is needed, and nvcc for the CUDA kernels.
"""
