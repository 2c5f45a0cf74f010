"""Lays the site out as the repository is, so that links between pages work in both.

A hook of MkDocs. README, docs and the benchmarks' notes keep their places; pages of the interface
are made of docstrings, a module each.
"""

from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PATTERNS = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "CITATION.cff",
    "docs/*.md",
    "docs/images/*.png",
    "benchmarks/*.md",
    "benchmarks/results/*.png",
    "studies/results/*/*.md",
    "studies/results/*/*.png",
)
# Beside the package itself: the modules that the pages import from.
MODULES = (
    "mlra_jax.config",
    "mlra_jax.execution",
    "mlra_jax.sharding",
    "mlra_jax.decoder",
    "mlra_jax.generation",
    "mlra_jax.cache",
    "mlra_jax.attention",
    "mlra_jax.attention.base",
    "mlra_jax.training.settings",
    "mlra_jax.data.sources",
    "mlra_jax.data.pipeline",
    "mlra_jax.data.tokenizers",
    "mlra_jax.data.token_file",
    "mlra_jax.convert",
    "mlra_jax.evaluate",
    "mlra_jax.evaluate.harness",
    "mlra_jax.costs",
    "mlra_jax.kernels.absorbed_decode",
    "mlra_jax.kernels.grouped_decode",
    "mlra_jax.kernels.exchange",
)


def on_files(files: Files, config) -> Files:
    for file in [file for file in files if Path(file.abs_src_path or "").is_relative_to(ROOT)]:
        files.remove(file)
    pages = [path for pattern in PATTERNS for path in sorted(ROOT.glob(pattern))]
    for path in pages:
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
    for module in ("mlra_jax", *MODULES):
        files.append(File.generated(config, f"api/{module}.md", content=api_page(module)))
    return files


def api_page(module: str) -> str:
    return f"# {module}\n\n::: {module}\n"


def on_config(config):
    """Pages that no section names stand under "More"; modules under "Interface"."""
    named = str(config.nav)
    more = [path.name for path in sorted(ROOT.glob("docs/*.md")) if path.name not in named]
    config.nav.append({"More": [f"docs/{name}" for name in more]}) if more else None
    [interface] = [section["Interface"] for section in config.nav if "Interface" in section]
    interface.extend(f"api/{module}.md" for module in MODULES)
    return config
