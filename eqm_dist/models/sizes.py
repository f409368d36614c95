"""What a backbone costs, in closed form.

Plain Python on purpose: ``--dry-run`` prints these numbers without importing torch.
"""

TIME_FREQUENCIES = 256
"""Width of the sinusoidal time embedding (official code)."""


def parameter_count(
    *,
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_classes: int,
    mlp_ratio: float = 4.0,
    learn_sigma: bool = False,
    qk_norm_size: int = 0,
    trainable_only: bool = False,
) -> int:
    """Parameters of a SiT; the frozen position table counts unless ``trainable_only``.

    ``qk_norm_size`` is the size of a head where queries and keys are normalised. It costs no matrix product.
    """
    tokens = (input_size // patch_size) ** 2
    mlp_size = int(hidden_size * mlp_ratio)
    patch_values = in_channels * patch_size**2
    output_values = patch_values * (2 if learn_sigma else 1)

    def linear(inputs: int, outputs: int) -> int:
        return (inputs + 1) * outputs

    block = (
        linear(hidden_size, 3 * hidden_size)
        + linear(hidden_size, hidden_size)
        + linear(hidden_size, mlp_size)
        + linear(mlp_size, hidden_size)
        + linear(hidden_size, 6 * hidden_size)
        + 2 * qk_norm_size
    )
    embedders = (
        linear(patch_values, hidden_size)
        + linear(TIME_FREQUENCIES, hidden_size)
        + linear(hidden_size, hidden_size)
        + (num_classes + 1) * hidden_size
    )
    final_layer = linear(hidden_size, output_values) + linear(hidden_size, 2 * hidden_size)
    position_table = 0 if trainable_only else tokens * hidden_size
    return embedders + position_table + depth * block + final_layer


def forward_macs(
    *,
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    mlp_ratio: float = 4.0,
    learn_sigma: bool = False,
) -> int:
    """Multiply-adds of one forward pass on one sample: matrix products only, attention's two included.

    The literature prints this number as "Gflops" (118.6e9 for XL/2 at 32x32x4). The number of heads does not matter.
    """
    tokens = (input_size // patch_size) ** 2
    mlp_size = int(hidden_size * mlp_ratio)
    patch_values = in_channels * patch_size**2
    output_values = patch_values * (2 if learn_sigma else 1)
    projections = tokens * hidden_size * (4 * hidden_size + 2 * mlp_size)
    attention = 2 * tokens**2 * hidden_size
    modulation = 6 * hidden_size**2
    embedders = tokens * patch_values * hidden_size + TIME_FREQUENCIES * hidden_size + hidden_size**2
    final_layer = tokens * hidden_size * output_values + 2 * hidden_size**2
    return depth * (projections + attention + modulation) + embedders + final_layer


def training_flops_per_image(macs: int) -> int:
    """FLOPs of one training step on one image: two per multiply-add, and the backward pass costs two forward passes."""
    return 6 * macs
