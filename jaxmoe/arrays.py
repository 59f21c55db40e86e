"""What the functions of the core take for an array."""

import numpy as np
from jaxtyping import Array

AnyArray = Array | np.ndarray
"""An array of JAX or of numpy: `Float[AnyArray, "expert out in"]`."""
