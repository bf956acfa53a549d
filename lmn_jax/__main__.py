"""Runs `python -m lmn_jax`, the same as the command `lmn-jax`."""

from lmn_jax.main import run_main

if __name__ == '__main__':
  run_main()
