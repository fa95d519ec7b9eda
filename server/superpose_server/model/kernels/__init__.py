"""Kernels of the engine's own for the CPU: `kernels.cpp` and its headers, compiled by `build`."""
