"""The gRPC door: superpose.v1, as `proto/` has it."""
