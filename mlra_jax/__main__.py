"""`python -m mlra_jax`: what each device caches, for every variant and split."""

from mlra_jax.costs import main

main()
