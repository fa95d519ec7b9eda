"""The wire contract of Superpose: protobuf messages and gRPC stubs (generated)."""
