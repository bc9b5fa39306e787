"""The version of zgraph, and those of what is installed beside it."""

from __future__ import annotations

from collections.abc import Iterable

__version__ = "0.1.0"


def package_versions(names: Iterable[str], missing: str) -> dict[str, str]:
    """Versions of zgraph, Python and packages, by name; `missing` for a package that is not installed."""
    import platform  # what `import zgraph` need not wait for
    from importlib import metadata

    found = {"zgraph": __version__, "python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = missing
    return found
