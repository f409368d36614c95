"""How fast samples are drawn: images and evaluations of the field a second, by precision, compiled, adaptive.

python -m benchmarks.bench_sampler [--size S] [--batch 16] [--nfe 20] [--cases fp32,bf16] [--rounds 3]

SiT at patch size 2 on 4x32x32 latents, random weights, classifier-free guidance 4 (so that the network sees twice the
batch), Nesterov's descent, no decoder, four times as many samples as slots. Cases take turns, round by round; a case is
told by ``PRECISION[+compile][+adaptive]``. Adaptive ones stop each sample at a part of its first norm, which typical
samples reach half-way; the fixed ones give every sample all evaluations, so that the wall times of the two say what
adaptive compute gives.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from benchmarks.record import RESULTS, write_record
from benchmarks.step_cases import CHANNELS, CLASSES, SIDE, build_model
from eqm_dist.compiled import compile_blocks, require_compiler
from eqm_dist.config import SIZES
from eqm_dist.core.guidance import TimedField, blind_to_time, guided
from eqm_dist.core.samplers import NesterovGradientDescent
from eqm_dist.core.sampling import GradientNormStop, SamplingMethod, in_order, sample_queue
from eqm_dist.precision import Precision, computed_in, in_effect, with_products

CFG_SCALE, ROUNDS_OF_SLOTS = 4.0, 4
SAMPLER = NesterovGradientDescent(0.01, 0.3)


def build_field(case: str, size: str, device: torch.device) -> TimedField:
    """The guided field of a case, as ``eqm_dist.build`` would make it."""
    precision, *words = case.split("+")
    precision = in_effect(cast("Precision", precision), device, "--cases")
    with torch.device(device):
        model = build_model(size, zero_init=False).eval()
    if "compile" in words:
        compile_blocks(model.blocks, any_size=True)
    field = guided(blind_to_time(computed_in(precision, model)), cfg_scale=CFG_SCALE, null_label=CLASSES)
    return with_products(precision, field)


def draw(field: TimedField, method: SamplingMethod, samples: int, slots: int, device: torch.device) -> Tensor:
    """Draw samples; returns the NFE of each."""
    labels = torch.arange(samples, device=device) % CLASSES
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(samples, CHANNELS, SIDE, SIDE, generator=generator).to(device)
    queue = sample_queue(
        lambda x, rows, time: field(x, labels[rows], time),
        lambda rows: noise[rows],
        torch.arange(samples, device=device),
        method,
        slots=slots,
    )
    return in_order(list(queue)).nfe.cpu()


def half_way(field: TimedField, nfe: int, batch: int, device: torch.device) -> float:
    """The part of its first norm that the field of a typical sample has half-way."""
    labels = torch.arange(batch, device=device) % CLASSES
    x = torch.randn(batch, CHANNELS, SIDE, SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    state, none = SAMPLER.start(x, nfe, 0.0), torch.zeros(batch, device=device)
    norms = []
    with torch.no_grad():
        for _ in range(nfe // 2):
            point, progress = SAMPLER.look(x, state, none)
            value = field(point, labels, progress)
            norms.append(value.square().mean(dim=(1, 2, 3)).sqrt())
            x, state, _ = SAMPLER.move(x, state, value, none)
    return float((norms[-1] / norms[0]).median())


def measure(case: str, size: str, batch: int, nfe: int, device: torch.device) -> dict[str, float]:
    """One round of one case."""
    field = build_field(case, size, device)
    draw(field, SamplingMethod(SAMPLER, 2, None), batch, batch, device)  # compiles, allocates
    adaptive = "adaptive" in case.split("+")
    stop = GradientNormStop(None, min(0.999, half_way(field, nfe, batch, device))) if adaptive else None
    samples = ROUNDS_OF_SLOTS * batch
    began = time.perf_counter()
    spent = draw(field, SamplingMethod(SAMPLER, nfe, stop), samples, batch, device)
    seconds = time.perf_counter() - began
    return {
        "images_per_s": samples / seconds,
        "evaluations_per_s": float(spent.sum()) / seconds,
        "nfe": float(spent.float().mean()),
        "seconds": seconds,
    }


def main() -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="S", help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="slots (default: %(default)s)")
    parser.add_argument("--nfe", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument("--cases", default="fp32,bf16,fp32+adaptive", metavar="CASE,...", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, metavar="DIR", help="where the record goes")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = arguments.cases.split(",")
    if any("compile" in case for case in cases):
        require_compiler(device, "+compile")
    rounds: dict[str, list[dict[str, float]]] = {case: [] for case in cases}
    for number in range(arguments.rounds):
        for case, found in rounds.items():
            found.append(measure(case, arguments.size, arguments.batch, arguments.nfe, device))
            print(f"round {number + 1}/{arguments.rounds} {case}: {found[-1]['seconds']:.1f} s", flush=True)
    table = {case: _medians(found) for case, found in rounds.items()}
    print(f"\n| {arguments.size}/2 x{arguments.batch} on {device.type} | images/s | evaluations/s | NFE an image |")
    print("|---" * 4 + "|")
    for case, row in table.items():
        print(f"| {case} | {row['images_per_s']:.2f} | {row['evaluations_per_s']:.1f} | {row['nfe']:.1f} |")
    setting = {"size": arguments.size, "batch": arguments.batch, "nfe": arguments.nfe, "cfg_scale": CFG_SCALE}
    print(f"\nwrote {write_record('sampler', device, {**setting, 'samplers': table, 'rounds': rounds}, arguments.out)}")


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


if __name__ == "__main__":
    main()
