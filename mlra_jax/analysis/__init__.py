"""Looking into a model: what positions change, how large values are, what branches attend to."""
