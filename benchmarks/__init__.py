"""The demo and the benchmarks; run from a clone, not part of the distribution."""
