"""Asking a cost which derivatives it has: what `fm.probe` does."""
