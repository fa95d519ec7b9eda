"""Kernels of the engine's own for the CPU: `kernels.cpp`, compiled once a machine by `build`."""
