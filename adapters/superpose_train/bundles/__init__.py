"""How the bundled base and its adapters were made; not installed."""
