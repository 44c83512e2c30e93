"""What the store knows of a model: its architecture, its weights, its vocabulary.

Nothing here imports torch or transformers: a store answers questions about the
model that made it on a machine that has neither.
"""
