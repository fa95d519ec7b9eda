"""What the calls of `superpose.v1` do, in its messages, whatever wire carries these.

gRPC sends the messages as they are. HTTP writes them as JSON: operators' calls are the same there,
to the name of a field.
"""
