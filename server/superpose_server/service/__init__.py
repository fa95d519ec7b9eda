"""The gRPC services. This package alone knows the messages; `server` registers it."""
