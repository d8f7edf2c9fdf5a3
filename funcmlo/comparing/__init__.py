"""Estimators side by side: what `fm.compare` does."""
