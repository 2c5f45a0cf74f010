"""Planted faults: small wrong changes of the package that the tests must notice."""
