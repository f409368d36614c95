"""SiT, the transformer backbone of Equilibrium Matching (Ma et al., arXiv 2401.08740), a DiT (arXiv 2212.09748).

Parameter names and shapes are those of the official EqM code, whose checkpoints load strictly.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from eqm_dist import rng
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.models.sizes import TIME_FREQUENCIES


class SiT(nn.Module):
    """A field f(x, labels) on square latents, class-conditional and, by default, blind to gamma.

    The model holds no randomness: label dropout is the caller's, who replaces labels by ``null_label``.

    Args:
        input_size: height and width of the latents; a multiple of ``patch_size``.
        patch_size: height and width of the patch that becomes one token.
        in_channels: channels of the latents.
        hidden_size: width of a token; a multiple of 4 and of ``num_heads``.
        depth: number of blocks.
        num_heads: attention heads per block.
        num_classes: labels are 0 .. num_classes - 1; ``num_classes`` itself is the null label.
        mlp_ratio: hidden width of a block's MLP, in units of ``hidden_size``.
        learn_sigma: twice the output channels, of which the second half is dropped, as in the official checkpoints.
        time_conditioned: feed gamma to the time embedder (flow matching); otherwise its input is 0.
        qk_norm: normalise queries and keys, which bounds the attention's logits (official checkpoints do not).
        checkpoint_blocks: keep only the inputs of blocks for the backward pass, which computes them again.
        zero_init: start with a final layer of zeros, so that f = 0. The l2 energy cannot leave that point: pass False.
        seed: the initial weights depend on it alone.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(
        self,
        input_size: int,
        patch_size: int,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        *,
        mlp_ratio: float = 4.0,
        learn_sigma: bool = False,
        time_conditioned: bool = False,
        qk_norm: bool = False,
        checkpoint_blocks: bool = False,
        zero_init: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if input_size % patch_size:
            raise ConfigError(f"input_size must be a multiple of patch_size, got {input_size} and {patch_size}.")
        if hidden_size % num_heads:
            raise ConfigError(f"hidden_size must be a multiple of num_heads, got {hidden_size} and {num_heads}.")
        if hidden_size % 4:
            raise ConfigError(
                f"hidden_size must be a multiple of 4 (sines and cosines of two coordinates), got {hidden_size}."
            )
        if num_classes < 1:
            raise ConfigError(f"num_classes must be at least 1, got {num_classes}; 1 serves a data set without labels.")
        self.latent_shape = (in_channels, input_size, input_size)
        self.patch_size = patch_size
        self.null_label = num_classes
        self.learn_sigma = learn_sigma
        self.time_conditioned = time_conditioned
        self.checkpoint_blocks = checkpoint_blocks
        self.zero_init = zero_init
        grid_size = input_size // patch_size
        out_channels = 2 * in_channels if learn_sigma else in_channels

        self.x_embedder = _PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = _TimeEmbedder(hidden_size)
        self.y_embedder = _LabelEmbedder(num_classes, hidden_size)
        self.pos_embed = nn.Parameter(torch.empty(1, grid_size**2, hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            _Block(hidden_size, num_heads, mlp_size=int(hidden_size * mlp_ratio), qk_norm=qk_norm) for _ in range(depth)
        )
        self.final_layer = _FinalLayer(hidden_size, patch_size**2 * out_channels)
        self.initialize(seed)

    def forward(
        self, x: Tensor, labels: Tensor, gamma: Tensor | None = None, *, return_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The field at x.

        Args:
            x: [B, C, H, W]; cast to the type of the parameters.
            labels: [B] int64 in [0, num_classes], not range-checked (that would stall a GPU).
            gamma: [B], for a time-conditioned model only.
            return_tokens: also return the tokens behind the last block, [B, tokens, hidden_size].

        Returns:
            [B, C, H, W], pointing downhill; with ``return_tokens`` a pair.

        Raises:
            DataError: latents or labels of another shape.
            ConfigError: gamma given to a time-free model, or kept from a time-conditioned one.
        """
        if x.shape[1:] != self.latent_shape:
            raise DataError(
                f"This model takes latents of shape {list(self.latent_shape)} per sample, got {list(x.shape[1:])}; "
                "its in_channels and input_size must be those of the data."
            )
        if labels.shape != x.shape[:1]:
            raise DataError(
                f"One label per sample is needed, got labels {list(labels.shape)} for {x.shape[0]} samples."
            )
        if self.time_conditioned and gamma is None:
            raise ConfigError("A time-conditioned model needs gamma; pass it, or build with time_conditioned=False.")
        if gamma is not None and not self.time_conditioned:
            raise ConfigError(
                "A time-free model must not see gamma; leave it out, or build with time_conditioned=True."
            )

        # Without conditioning one row, the embedding of time 0, serves the whole batch.
        time = x.new_zeros(1) if gamma is None else gamma
        label_embedding = self.y_embedder(labels)
        condition = self.t_embedder(time, label_embedding.dtype) + label_embedding
        tokens = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            if self.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, use_reentrant=False)
            else:
                tokens = block(tokens, condition)
        field = _from_patches(self.final_layer(tokens, condition), self.patch_size)
        field = field.chunk(2, dim=1)[0] if self.learn_sigma else field
        return (field, tokens) if return_tokens else field

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Set all weights to their initial values, a function of the seed alone.

        They do not depend on torch's global generator, the rank or the device (normal draws up to a rare last bit).
        A model built on the meta device has none; call this after ``to_empty``.

        As in the official code: Xavier-uniform linear layers with zero biases, normal label and time embeddings of
        standard deviation 0.02, the sine and cosine position table, zero modulation layers and, with ``zero_init``, a
        zero output. The weights of norms are 1.
        """
        if self.pos_embed.is_meta:
            return
        for index, (name, parameter) in enumerate(self.named_parameters()):
            position = torch.tensor([index], device=parameter.device)
            if name == "pos_embed":
                grid_size = self.latent_shape[1] // self.patch_size
                parameter.copy_(_position_table(parameter.shape[-1], grid_size))
            elif "_norm.weight" in name:
                parameter.fill_(1)
            elif name.endswith("bias") or "adaLN" in name or (name == "final_layer.linear.weight" and self.zero_init):
                parameter.zero_()
            elif name.startswith(("y_embedder", "t_embedder")):
                parameter.copy_(0.02 * rng.normal(seed, rng.Stream.INIT, position, parameter.shape)[0])
            else:
                fan_out, fan_in = parameter.flatten(1).shape
                bound = math.sqrt(6 / (fan_in + fan_out))
                parameter.copy_(bound * (2 * rng.uniform(seed, rng.Stream.INIT, position, parameter.shape)[0] - 1))


class _PatchEmbedder(nn.Module):
    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = _PatchProjection(patch_size, in_channels, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _PatchProjection(nn.Module):
    """A convolution of stride ``patch_size``, with its weight's shape, as a matrix product.

    The product obeys the matmul precision setting (a convolution runs in TF32 by default) and its gradient is
    deterministic.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size, in_channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        patches = _to_patches(x.to(self.weight.dtype), self.weight.shape[-1])
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class _TimeEmbedder(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(TIME_FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        # Angles lose too much in bfloat16 and float16.
        wide = torch.promote_types(dtype, torch.float32)
        half = TIME_FREQUENCIES // 2
        exponents = torch.arange(half, dtype=wide, device=time.device) / half
        angles = time.to(wide)[:, None] * torch.exp(-math.log(10_000) * exponents)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


class _LabelEmbedder(nn.Module):
    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class _Block(nn.Module):
    """A transformer block whose shifts, scales and gates come from the condition (adaLN-Zero)."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_size: int, qk_norm: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = _Attention(hidden_size, num_heads, qk_norm)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = _Mlp(hidden_size, mlp_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        modulation = self.adaLN_modulation(condition)[:, None]
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        tokens = tokens + gate_attn * self.attn(_modulate(self.norm1(tokens), shift_attn, scale_attn))
        return tokens + gate_mlp * self.mlp(_modulate(self.norm2(tokens), shift_mlp, scale_mlp))


class _Attention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = _RmsNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.k_norm = _RmsNorm(hidden_size // num_heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        heads = self.qkv(tokens).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        # Views, so that the backward pass stacks the three gradients in the layout of the product, without a copy more.
        query, key, value = (head.transpose(1, 2) for head in heads)
        mixed = functional.scaled_dot_product_attention(self.q_norm(query), self.k_norm(key), value)
        return self.proj(mixed.transpose(1, 2).flatten(2))


class _RmsNorm(nn.Module):
    """x / sqrt(mean(x^2)) * weight over the last dimension, in plain operations, which have a second derivative.

    On queries and keys of size d it bounds the logits by sqrt(d) times the largest product of their weights (Dehghani
    et al., arXiv 2302.05442; with learned weights as in Esser et al., arXiv 2403.03206).
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class _Mlp(nn.Module):
    def __init__(self, hidden_size: int, mlp_size: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(tokens), approximate="tanh"))


class _FinalLayer(nn.Module):
    def __init__(self, hidden_size: int, output_values: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, output_values)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(tokens), shift, scale))


def _modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return tokens * (1 + scale) + shift


def _to_patches(x: Tensor, patch_size: int) -> Tensor:
    """[B, C, H, W] -> [B, tokens, C * p * p], the order of a convolution's weight."""
    blocks = x.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # B C h p w q
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _from_patches(patches: Tensor, patch_size: int) -> Tensor:
    """[B, tokens, p * p * C] -> [B, C, H, W], the order of the official output layer."""
    grid_size = math.isqrt(patches.shape[1])
    blocks = patches.unflatten(2, (patch_size, patch_size, -1)).unflatten(1, (grid_size, grid_size))  # B h w p q C
    return blocks.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _position_table(hidden_size: int, grid_size: int) -> Tensor:
    """[tokens, hidden_size] float64: sines and cosines of the column, then of the row, at geometric frequencies."""
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** -(torch.arange(quarter, dtype=torch.float64, device="cpu") / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64, device="cpu")[:, None] * frequencies
    coordinate = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = coordinate.expand(grid_size, -1, -1)
    rows = coordinate[:, None].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).flatten(0, 1)
