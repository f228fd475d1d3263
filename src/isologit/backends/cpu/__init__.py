"""The CPU backend: kernels written in Python and compiled by Numba, for the host's vector width."""
