"""Kernels over plain tensors: ``reference`` in torch, ``triton``, and ``native`` in C++ and CUDA, which needs no torch.

This package never imports ``flora_core``; checks and autograd live there, in ``ops.py``.
"""
