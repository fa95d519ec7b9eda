"""The study: adapters summed against adapters trained jointly, as arXiv 2508.11985 and beyond."""
