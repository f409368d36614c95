"""Bytes of model state that a worker holds, in closed form; benchmarks/bench_memory.py measures the same."""

FP32_BYTES = 4


def model_state_bytes(parameters: int, emas: int, zero_stage: int, workers: int) -> int:
    """Weights, moments, EMAs and the gradient, while the optimizer updates.

    ZeRO 1 and up hold the weights twice: those that compute, and the fp32 partition that the optimizer updates. ZeRO 3
    holds the gradient twice too. Left out is what hardly grows with the model: padding, and under ZeRO 3 the small
    parameters that stay whole and a buffer of at most 200 MB.

    Args:
        parameters: how many are trained.
        emas: how many EMAs of the weights are kept.
        zero_stage: 0 also for the plain engine.
        workers: that share the state.
    """
    gradients = 2 if zero_stage == 3 else 1
    states = 1 + 2 + emas + gradients  # fp32 weight, two moments
    if zero_stage == 0:
        return FP32_BYTES * states * parameters
    computing = parameters if zero_stage < 3 else -(-parameters // workers)
    return FP32_BYTES * (computing + states * -(-parameters // workers))
