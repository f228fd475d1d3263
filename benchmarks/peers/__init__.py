"""This engine beside its peers: the same requests, weights and precision, each system in a process of its own."""
