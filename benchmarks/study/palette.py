"""Colours of all figures: told apart in print and by colour-blind readers."""

INK = "#1f4e79"
ACCENT = "#c8553d"
THIRD = "#4f8a5b"
FOURTH = "#8d6a9f"
GRAY = "#7a7a7a"
SERIES = (INK, ACCENT, THIRD, FOURTH, "#b8902b", "#3f9aa8", "#6b6b6b", "#a05c7b")
