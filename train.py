"""Train a model: python train.py --config=configs/NAME.py --workdir=DIR (or --help)."""

from mlra_jax.training.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
