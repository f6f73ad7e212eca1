"""Kernels of the engine over plain tensors: a reference in torch now, Triton and native code beside it later.

This package never imports ``flora_core``; checks and autograd live there, in ``ops.py``.
"""
