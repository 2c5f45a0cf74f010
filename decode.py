"""Continue text from a checkpoint: python decode.py --checkpoint=DIR --prompt=TEXT (or --help)."""

from mlra_jax.generation.__main__ import main

if __name__ == "__main__":
    raise SystemExit(main())
