"""The model itself: reading and identity, the graph, and what it is fed."""
