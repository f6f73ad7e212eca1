"""The version of flora_core and of flora_kernels: this line is the only place of it."""

__version__ = "0.1.0"
