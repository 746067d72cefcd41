"""Where the shipped weights of nano lie; light to import, unlike what loads them."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
