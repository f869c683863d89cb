"""Prepare a loaded model for the device it will run on."""

from __future__ import annotations

import mlx.nn as nn


def prepare_for_host(model: nn.Module) -> None:
    """On a CPU without Accelerate: float32 activations and the host kernels. Elsewhere nothing changes."""
    # Imported here because numba is a dependency on Linux only.
    from llmcad_mlx.models.cpu_linear import host_kernels_wanted

    if not host_kernels_wanted():
        return
    from llmcad_mlx.models.cpu_block import install_host_blocks
    from llmcad_mlx.models.cpu_linear import install_host_kernels

    install_host_kernels(model)
    install_host_blocks(model)
