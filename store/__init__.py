"""What is on disk, and how it gets there and back.

The store room knows nothing of models in memory, of queries or of services: it
defines format 1 (``docs/architecture.md``), writes it so that nothing is ever
half there, and reads it so that nothing is ever silently wrong.
"""
