"""Model and corpus in, committed segments out."""
