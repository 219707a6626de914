"""What operations of a step are for, and how many kernels ours launch."""

# Kernels that an op of miro_kernels launches; tests/kernels/compiled/test_launches.py counts them.
LAUNCHES = {
    "reward_adaln": 1, "reward_gated_residual_adaln": 1, "reward_adaln_backward": 3,
    "reward_gated_residual_adaln_backward": 3, "qk_norm_rope": 1, "qk_norm_rope_backward": 2,
    "attention": 1, "attention_backward": 2, "swiglu": 1, "swiglu_backward": 1,
}  # fmt: skip
GEMMS = {"mm", "addmm", "bmm", "baddbmm"}
MOVING = {"cat", "clone", "copy_", "_to_copy", "index", "index_copy", "index_select", "stack"}
MOVING |= {"slice_backward", "select_backward", "fill_", "zero_", "zeros", "zeros_like"}
MOVING |= {"ones_like", "new_zeros", "index_add", "_index_put_impl_", "arange"}


def group_of(op: str, namespace: str) -> str:
    """What an operation is for."""
    if "attention" in op:
        return "attention"
    if op in GEMMS:
        return "GEMM"
    if namespace == "miro":
        return "fused"
    return "data movement" if op in MOVING else "elementwise and reductions"
