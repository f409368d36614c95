import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from eqm_dist.config import SIZES
from eqm_dist.errors import ConfigError, DataError
from eqm_dist.models import SiT
from eqm_dist.models.sit import _Attention
from eqm_dist.models.sizes import forward_macs, parameter_count, training_flops_per_image

GOLDEN = Path(__file__).parent / "golden"
LATENTS: dict[str, Any] = {"input_size": 32, "in_channels": 4}
SMALL: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 3,
    "hidden_size": 8,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 5,
}


def published_model(size: str, patch_size: int) -> dict[str, Any]:
    depth, hidden_size, _ = SIZES[size]
    return {**LATENTS, "patch_size": patch_size, "depth": depth, "hidden_size": hidden_size}


@pytest.mark.parametrize("patch_size", [2, 4, 8])
@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_parameter_counts_of_the_official_models(size: str, patch_size: int) -> None:
    golden = json.loads((GOLDEN / "param_counts.json").read_text())[f"EqM-{size}/{patch_size}"]
    numbers = {**published_model(size, patch_size), "num_classes": 1000, "learn_sigma": True}
    assert parameter_count(**numbers) == golden["params"]
    assert parameter_count(**numbers, trainable_only=True) == golden["trainable"]

    with torch.device("meta"):
        model = SiT(**numbers, num_heads=SIZES[size].num_heads)
    assert sum(p.numel() for p in model.parameters()) == golden["params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == golden["trainable"]


def test_names_and_shapes_are_those_of_the_official_model() -> None:
    golden = json.loads((GOLDEN / "eqm_b2_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        model = SiT(**published_model("B", 2), num_heads=12, num_classes=1000, learn_sigma=True)
    assert {name: list(value.shape) for name, value in model.state_dict().items()} == golden
    # The order matters as well: an optimizer state refers to parameters by number.
    assert list(model.state_dict()) == list(golden)


@pytest.mark.parametrize(("size", "gigamacs"), [("S", 6.06), ("B", 23.01), ("L", 80.71), ("XL", 118.64)])
def test_multiply_adds_of_the_published_table(size: str, gigamacs: float) -> None:
    macs = forward_macs(**published_model(size, 2), learn_sigma=True)
    # The table, which prints them as "Gflops", counts a few element-wise operations too.
    assert macs / 1e9 == pytest.approx(gigamacs, abs=0.05)
    assert training_flops_per_image(macs) == 6 * macs


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_multiply_adds_agree_with_torchs_counter(learn_sigma: bool) -> None:
    numbers: dict[str, Any] = {**SMALL, "depth": 3, "learn_sigma": learn_sigma, "mlp_ratio": 2.5}
    model = SiT(**numbers)
    # The counter knows matrix products, not the fused attention of a CPU.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        model(torch.zeros(1, 3, 4, 4), torch.tensor([0]))
    del numbers["num_heads"], numbers["num_classes"]
    assert counter.get_total_flops() == 2 * forward_macs(**numbers)


def test_sizes_can_be_read_without_importing_torch() -> None:
    script = "import sys, eqm_dist.models.sizes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    patch_size = draw(st.integers(1, 3))
    num_heads = draw(st.integers(1, 3))
    return {
        "patch_size": patch_size,
        "input_size": patch_size * draw(st.integers(1, 4)),
        "in_channels": draw(st.integers(1, 5)),
        "hidden_size": 4 * num_heads * draw(st.integers(1, 3)),
        "num_heads": num_heads,
        "depth": draw(st.integers(0, 2)),
        "num_classes": draw(st.integers(1, 4)),
        "learn_sigma": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
    }


@given(configurations(), st.integers(0, 3))
@settings(max_examples=25)
def test_shapes_and_closed_form_count_for_any_valid_sizes(numbers: dict[str, Any], batch: int) -> None:
    model = SiT(**numbers, zero_init=False)
    x = torch.randn(batch, numbers["in_channels"], numbers["input_size"], numbers["input_size"])
    assert model(x, torch.full((batch,), model.null_label)).shape == x.shape
    counted = dict(numbers)
    head_size = counted["hidden_size"] // counted.pop("num_heads")
    counted["qk_norm_size"] = head_size if counted.pop("qk_norm") else 0
    assert sum(p.numel() for p in model.parameters()) == parameter_count(**counted)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = SiT(**SMALL, seed=3).state_dict()
    torch.manual_seed(2)
    same, other = SiT(**SMALL, seed=3).state_dict(), SiT(**SMALL, seed=4).state_dict()
    assert all(torch.equal(one[name], same[name]) for name in one)
    random = [name for name in one if one[name].std() > 0 and name != "pos_embed"]
    assert random
    assert not any(torch.equal(one[name], other[name]) for name in random)


def test_a_model_built_on_the_meta_device_gets_the_same_weights() -> None:
    with torch.device("meta"):
        model = SiT(**SMALL)
    model.to_empty(device="cpu").initialize(seed=3)
    expected = SiT(**SMALL, seed=3).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_initial_distributions_are_the_official_ones() -> None:
    model = SiT(**{**SMALL, "hidden_size": 128, "num_classes": 500}, zero_init=False)
    weights = dict(model.named_parameters())
    qkv = weights["blocks.0.attn.qkv.weight"]
    bound = (6 / (4 * 128)) ** 0.5  # Xavier: sqrt(6 / (fan_in + fan_out))
    assert qkv.abs().max() <= bound
    # A uniform number on (-b, b) has standard deviation b / sqrt(3); 49,152 of them give it to 1 % (5 sigma: 1 %).
    assert qkv.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert weights["x_embedder.proj.weight"].abs().max() <= (6 / (128 + 12)) ** 0.5
    assert weights["y_embedder.embedding_table.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["t_embedder.mlp.0.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["final_layer.linear.weight"].std() > 0
    for name, weight in weights.items():
        if name.endswith("bias") or "adaLN" in name:
            assert not weight.any(), name
        assert weight.requires_grad is (name != "pos_embed")


def test_a_fresh_model_is_the_zero_field_unless_asked_otherwise() -> None:
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    assert not SiT(**SMALL)(x, labels).any()
    assert SiT(**SMALL, zero_init=False)(x, labels).any()


def test_the_patch_projection_is_a_strided_convolution() -> None:
    projection = SiT(**SMALL).double().x_embedder.proj
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    convolved = torch.nn.functional.conv2d(x, projection.weight, projection.bias, stride=2)
    torch.testing.assert_close(projection(x), convolved.flatten(2).mT, rtol=1e-12, atol=1e-12)


def make_random(**changes: Any) -> SiT:
    """A model none of whose layers is zero, so that every input shows in the output."""
    model = SiT(**{**SMALL, **changes}, zero_init=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_time_conditioning_reaches_the_output_and_time_zero_is_the_time_free_model() -> None:
    timed, free = make_random(time_conditioned=True).double(), make_random().double()
    x, labels = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 5])
    zeros = torch.zeros(2, dtype=torch.float64)
    torch.testing.assert_close(timed(x, labels, zeros), free(x, labels), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(timed(x, labels, zeros + 0.5), free(x, labels))
    assert not torch.allclose(free(x, labels), free(x, labels.flip(0)))


def test_samples_do_not_see_each_other() -> None:
    model = make_random().double()
    x, labels = torch.randn(3, 3, 4, 4, dtype=torch.float64), torch.tensor([0, 1, 5])
    alone = torch.cat([model(x[i : i + 1], labels[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(model(x, labels), alone, rtol=1e-12, atol=1e-12)


def test_half_precision_parameters_take_full_precision_latents() -> None:
    model = make_random()
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    expected = model(x, labels)
    result = model.bfloat16()(x, labels)
    assert result.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits; a few dozen operations in a row lose about three of them.
    assert (result.float() - expected).norm() < 0.05 * expected.norm()


def test_the_model_compiles_to_one_graph() -> None:
    model = make_random()
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([0, 1])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, labels), model(x, labels))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_size": 5}, "multiple of patch_size, got 5 and 2"),
        ({"num_heads": 3}, "multiple of num_heads, got 8 and 3"),
        ({"hidden_size": 6}, "multiple of 4"),
        ({"num_classes": 0}, "num_classes"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SiT(**{**SMALL, **changes})


def test_inputs_that_do_not_fit_are_refused() -> None:
    model, timed = SiT(**SMALL), SiT(**SMALL, time_conditioned=True)
    x, labels, gamma = torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    with pytest.raises(DataError, match=r"\[3, 4, 4\] per sample, got \[3, 4, 8\]"):
        model(torch.zeros(2, 3, 4, 8), labels)
    with pytest.raises(DataError, match="One label per sample"):
        model(x, labels[:1])
    with pytest.raises(ConfigError, match="must not see gamma"):
        model(x, labels, gamma)
    with pytest.raises(ConfigError, match="needs gamma"):
        timed(x, labels)


# --- queries and keys that are normalised, activations that are computed again ---

MOVED: dict[str, Any] = {**SMALL, "hidden_size": 16, "depth": 2, "zero_init": False}


def moved(**changes: Any) -> SiT:
    """A model whose blocks take part, as they do once trained."""
    model = SiT(**{**MOVED, **changes})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adaLN" in name:
                parameter.normal_(std=0.2, generator=generator)
    return model


def blocks(model: SiT) -> Iterator[Any]:
    return iter(model.blocks)  # torch's types know only modules of no kind


def blow_up(model: SiT, factor: float) -> None:
    """Multiply the weights of all queries and keys."""
    with torch.no_grad():
        for block in blocks(model):
            block.attn.qkv.weight[: 2 * MOVED["hidden_size"]] *= factor


def inputs(batch: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, 4, 4, generator=generator), torch.arange(batch) % 5


def test_normalised_attention_does_not_feel_how_large_its_weights_are() -> None:
    for qk_norm, feels in [(False, True), (True, False)]:
        model = moved(qk_norm=qk_norm)
        before = model(*inputs())
        blow_up(model, 100.0)
        # Only the 1e-6 under the root tells the two apart.
        assert torch.allclose(model(*inputs()), before, rtol=1e-3, atol=1e-3) is not feels


def test_normalised_logits_are_bounded() -> None:
    model, heads = moved(qk_norm=True), []
    generator = torch.Generator().manual_seed(2)
    for block in blocks(model):
        for norm in (block.attn.q_norm, block.attn.k_norm):
            torch.nn.init.uniform_(norm.weight, -2, 2, generator=generator)
            norm.register_forward_hook(lambda module, arguments, out: heads.append((module, out)))
    blow_up(model, 1e3)
    model(*inputs())
    for (q_norm, query), (k_norm, key) in zip(heads[::2], heads[1::2], strict=True):
        size = query.shape[-1]
        largest = (query @ key.transpose(-1, -2) / size**0.5).abs().max().item()
        bound = size**0.5 * (q_norm.weight.abs().max() * k_norm.weight.abs().max()).item()
        assert bound / 10 < largest <= bound * (1 + 1e-6)


def test_gradients_in_bf16_stay_finite_where_attention_blows_up() -> None:
    for qk_norm, finite in [(False, False), (True, True)]:
        model = moved(qk_norm=qk_norm)
        blow_up(model, 1e20)
        x, labels = inputs()
        with torch.autocast("cpu", torch.bfloat16):
            field = model(x, labels)
        (field.float() - x).square().mean().backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        assert all(bool(gradient.isfinite().all()) for gradient in gradients) is finite


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_that_are_computed_again_change_no_bit(bf16: bool) -> None:
    found, saved = [], []
    for checkpoint_blocks in (False, True):
        model, size = moved(qk_norm=True, checkpoint_blocks=checkpoint_blocks), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal size
            size += tensor.numel()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            loss = model(*inputs()).float().square().mean()
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in model.parameters() if parameter.requires_grad)])
        saved.append(size)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    assert saved[1] < saved[0] / 2


def test_attention_makes_no_copy_in_its_backward_pass_and_keeps_every_bit() -> None:
    torch.manual_seed(0)
    attention = _Attention(32, 2, qk_norm=True)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    tokens, upstream = torch.randn(3, 16, 32, requires_grad=True), torch.randn(3, 16, 32)

    def permuted(tokens: Tensor) -> Tensor:  # as in the official code
        heads = attention.qkv(tokens).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        mixed = torch.nn.functional.scaled_dot_product_attention(attention.q_norm(query), attention.k_norm(key), value)
        return attention.proj(mixed.transpose(1, 2).flatten(2))

    found = []
    for forward in (permuted, attention):
        result = forward(tokens)
        with _Copies() as copies:
            gradients = torch.autograd.grad((result * upstream).sum(), [tokens, *attention.parameters()])
        found.append((copies.count, result, *gradients))
    (copied, *expected), (left, *values) = found
    assert (copied, left) == (1, 0)
    assert all(torch.equal(value, other) for value, other in zip(values, expected, strict=True))


class _Copies(TorchDispatchMode):
    """Counts tensors that are copied into another layout."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket == torch.ops.aten.clone
        return func(*args, **(kwargs or {}))
