"""What every test runs under: eight simulated devices, no silent promotion of rank or dtype."""

import jax
from hypothesis import settings

# Before the first device is asked for; afterwards it is too late.
jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_numpy_dtype_promotion', 'strict')
# Small programs run once: compiling them fast matters more than running them fast.
jax.config.update('jax_disable_most_optimizations', True)

# A first call compiles, and the machine may be shared: no deadline. The same examples each time.
settings.register_profile('lmn_jax', deadline=None, derandomize=True, max_examples=50)
settings.load_profile('lmn_jax')
