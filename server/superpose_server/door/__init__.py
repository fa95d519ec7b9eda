"""How clients get in: gRPC. This package alone knows the messages and the socket."""
