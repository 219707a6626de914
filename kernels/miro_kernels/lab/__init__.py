"""What a machine without a GPU can prove of a Triton kernel; for tests and reports, not for runs.

    interpret   Triton's interpreter, with bf16 and tf32 computed as the hardware does
    traffic     bytes an interpreted kernel moves; out-of-bounds lanes, races, unfilled masked loads
    compiled    compilation for GPUs that are not there, through the launch code; what ptxas made
    inductor    what torch.compile would generate for an H100, and the bytes it would move
    testing     the one comparison of a kernel with its reference
    cases       every op, direction and shape that the lanes and the report go through

Interpreter and compiler exclude each other: TRITON_INTERPRET=1 must be set, or absent, before
triton is imported, so each lane is a process of its own.
"""
