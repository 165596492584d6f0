"""The only package that imports vLLM. `register` is vLLM's entry point ``vllm.general_plugins``.

vLLM swallows exceptions of loading an entry point and passes on those of calling it, in every process of an
environment: so this module imports nothing heavy, and `register` never raises. What is wrong is said when a
--pipeline flag is used.
"""

__all__ = ["register"]


def register() -> None:
    """Adds the --pipeline flags to vLLM's parsers. Changes nothing for people who do not use them."""
    from stagewire.vllm_plugin.entry.install import install_flag_patches

    install_flag_patches()
