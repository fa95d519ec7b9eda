"""Adapters, mixes and their arithmetic; needs no network and no grpc."""
