"""Committed segments in, exact answers out."""
