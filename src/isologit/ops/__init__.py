"""Numeric operations: definitions, kernels and the registry that ties them."""
