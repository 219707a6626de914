"""Correctness and cost of Triton kernels without a GPU, for tests and reports; runs never use it.

    interpreter    Triton's interpreter, patched to compute bf16 and tf32 as the hardware does
    traffic        bytes moved by interpreted kernels; out-of-bounds lanes, races, unfilled loads
    access_log     the accesses of one launch, for `traffic`
    resources      ahead-of-time compilation through the launch code: registers, spills, SASS
    inductor       what torch.compile would generate for an H100, and the bytes it would move
    eager          bytes moved by torch's own operations
    testing        comparison of a kernel with its reference
    cases          every op and direction at the preset's shapes
    case_metrics   bytes, errors and resources of a case
    private_torch, private_triton   all private names that the lab depends on

The interpreter and the compiler exclude each other: Triton reads TRITON_INTERPRET when it is
imported, so tests of each run in a process of their own.
"""
