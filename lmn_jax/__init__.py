"""lmn_jax: memory-augmented recommendation over long behaviour histories, in JAX."""

__version__ = '0.1.0'
