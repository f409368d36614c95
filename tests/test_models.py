import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from eqm_dist.errors import ConfigError, DataError
from eqm_dist.models import SiT
from eqm_dist.models.sizes import SIZES, forward_macs, parameter_count, training_flops_per_image

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
    }


@given(configurations(), st.integers(0, 3))
@settings(max_examples=25)
def test_shapes_and_closed_form_count_for_any_valid_sizes(numbers: dict[str, Any], batch: int) -> None:
    model = SiT(**numbers, zero_init=False)
    x = torch.randn(batch, numbers["in_channels"], numbers["input_size"], numbers["input_size"])
    assert model(x, torch.full((batch,), model.null_label)).shape == x.shape
    counted = dict(numbers)
    del counted["num_heads"]
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
