import pytest
import torch

from eqm_dist.core.guidance import guided
from eqm_dist.errors import ConfigError

NULL = 9
X = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
LABELS = torch.tensor([1, 2, 3])


def field(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return x.sin() * labels[:, None, None, None] + 1


@pytest.mark.parametrize("cfg_scale", [0.0, 0.5, 1.5, 4.0])
@pytest.mark.parametrize("channels", [None, 1, 3, 4])
def test_guidance_extrapolates_from_the_null_field(cfg_scale: float, channels: int | None) -> None:
    conditional, unconditional = field(X, LABELS), field(X, torch.full_like(LABELS, NULL))
    expected = unconditional + cfg_scale * (conditional - unconditional)
    if channels is not None:
        expected[:, channels:] = conditional[:, channels:]
    result = guided(field, cfg_scale=cfg_scale, null_label=NULL, guided_channels=channels)(X, LABELS)
    torch.testing.assert_close(result, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("cfg_scale", "sizes"), [(1.0, [3]), (1.5, [6])])
def test_one_call_on_the_doubled_batch_and_no_doubling_at_scale_one(cfg_scale: float, sizes: list[int]) -> None:
    seen = []

    def counted(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return field(x, labels)

    assert guided(counted, cfg_scale=cfg_scale, null_label=NULL)(X, LABELS).shape == X.shape
    assert seen == sizes


@pytest.mark.parametrize("channels", [None, 2])
def test_guidance_within_an_interval_doubles_only_the_samples_inside(channels: int | None) -> None:
    seen = []

    def timed(x: torch.Tensor, labels: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return field(x, labels) + time[:, None, None, None]

    def guide(interval: tuple[float, float] | None):
        return guided(timed, cfg_scale=2.0, null_label=NULL, guided_channels=channels, interval=interval)

    time = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    everywhere, nowhere = guide(None)(X, LABELS, time), timed(X, LABELS, time)
    seen.clear()
    some = guide((0.2, 0.9))(X, LABELS, time)
    assert seen == [4]
    assert torch.equal(some, torch.stack([nowhere[0], everywhere[1], nowhere[2]]))
    assert torch.equal(guide((0.0, 1.0))(X, LABELS, time), everywhere)
    assert torch.equal(guide((0.6, 0.7))(X, LABELS, time), nowhere)


@pytest.mark.parametrize("interval", [(0.5, 0.5), (-0.1, 0.5), (0.5, 1.1)])
def test_an_interval_out_of_range_is_refused(interval: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="interval"):
        guided(field, cfg_scale=2.0, null_label=NULL, interval=interval)


@pytest.mark.parametrize("cfg_scale", [-1.0, float("inf"), float("nan")])
def test_a_scale_out_of_range_is_refused(cfg_scale: float) -> None:
    with pytest.raises(ConfigError, match="cfg_scale"):
        guided(field, cfg_scale=cfg_scale, null_label=NULL)


def test_a_number_of_channels_that_do_not_exist_is_refused() -> None:
    with pytest.raises(ConfigError, match="guided_channels"):
        guided(field, cfg_scale=2.0, null_label=NULL, guided_channels=0)
    with pytest.raises(ConfigError, match="4 channels"):
        guided(field, cfg_scale=2.0, null_label=NULL, guided_channels=5)(X, LABELS)
