"""Replicas that run the rows of one server, on one machine or many, kept by Ray Serve."""
