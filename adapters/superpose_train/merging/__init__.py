"""Merging offline: the command, and what the methods learn that need rows and the base."""
