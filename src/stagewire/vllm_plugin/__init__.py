"""The only package that imports vLLM. `register` is vLLM's entry point ``vllm.general_plugins``.

vLLM loads and calls the entry point in every process of an environment. It ignores an exception while it loads one, but
not while it calls one. So this module imports nothing heavy, and `register` never raises. A patch that does not fit is
reported on stderr. An unsupported version of vLLM is refused when a --pipeline flag is used.
"""

__all__ = ["register"]


def register() -> None:
    """Adds the --pipeline flags to vLLM's parsers. Changes nothing where they are not used."""
    from stagewire.vllm_plugin.entry.install import install_flag_patches

    install_flag_patches()
