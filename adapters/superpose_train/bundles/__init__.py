"""How `mini` and the adapters of the bundles were made; not installed."""
