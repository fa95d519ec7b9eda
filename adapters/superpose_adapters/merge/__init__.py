"""Ways of making one adapter of several: one file a method, all from the low-rank factors."""
