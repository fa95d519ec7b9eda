"""The server: one resident model, any mix of its domains."""
