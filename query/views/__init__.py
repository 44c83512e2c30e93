"""What pages, notebooks and the API show of a store: values with their labels, no markup.

Every view is a frozen dataclass made from an open store by a classmethod ``of``.
"""
