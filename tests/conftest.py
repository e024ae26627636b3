"""Before any test imports torch: offmoe's choice of how OpenMP threads wait."""

import offmoe  # noqa: F401
