"""What the functions of the core take for arrays and numbers."""

import numpy as np
from jaxtyping import Array, Num

AnyArray = Array | np.ndarray
"""An array of JAX or of numpy: `Float[AnyArray, "expert out in"]`."""

Scalar = float | Num[AnyArray, ""]
"""A number, which may be traced."""
