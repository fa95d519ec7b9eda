"""The gRPC services. Only this package knows the wire contract."""
