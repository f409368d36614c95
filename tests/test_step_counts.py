"""What an eager step is made of: a kernel more, or a pass over memory more, in a block or in the draws shows here."""

from benchmarks.step_counts import counts


def test_kernels_and_bytes_of_the_largest_model() -> None:
    found = counts("XL", 32)
    # Twelve of the 33 are casts of weights and activations to bf16, which compiled blocks fuse away.
    assert found["block"]["forward_kernels"] == 33
    assert found["block"]["backward_kernels"] == 57
    # 982 MB and 1,945 MB of elementwise passes, and 143 MB of casts of weights (6 bytes each) in both directions.
    assert found["block"]["forward_elementwise_mb"] == 1126
    assert found["block"]["backward_elementwise_mb"] == 2092
    assert found["draws_kernels_eager"] <= 606  # which compilation brings to 20: tests/test_compiled.py
    assert found["gflop_per_image"] == 711.7  # 3 x 2 x the multiply-adds of a forward pass
