"""What `pyproject.toml` cannot say: the configs lie beside the package and are installed in it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["mlra_jax*"]), "mlra_jax.configs"],
    package_dir={"mlra_jax.configs": "configs"},
)
