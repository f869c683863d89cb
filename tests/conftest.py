"""Settings that must be there before the first test module is imported."""

import os

# As `models.host.prepare_for_host` does; kernel tests call the kernels without it.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
