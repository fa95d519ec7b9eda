"""The experiments: what each needs to know, and what it makes of it."""
