"""Many adapters at once over one frozen base."""
