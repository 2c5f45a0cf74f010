"""Experiments of this project on itself; they import the package, nothing imports them."""
