"""GRPO whose gradient is kept out of a reward-hacking subspace, and the controls that test the claim.

    from projected_grpo import DeltaSConfig, HackBasis, ProjectionCallback, load_pairs

Importing the package is cheap: torch and the rest come with the first name that needs them. The PEFT method is
registered as soon as `peft` itself is imported, before or after this package.
"""

from importlib import import_module

from wrapt import register_post_import_hook

_HOME = {
    "DeltaSConfig": "adapter",
    "HackBasis": "basis",
    "ProjectionCallback": "projection",
    "load_pairs": "pairs",
}
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


# Importing the adapter's module registers it.
register_post_import_hook(lambda _peft: import_module(f"{__name__}.adapter"), "peft")
