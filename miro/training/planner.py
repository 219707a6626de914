"""The fastest plan that fits: micro-batch, accumulation, ZeRO stage and activation checkpointing.

Every combination that `ShardingConfig` leaves open is estimated, its memory by
`miro.training.memory` and its time by `step_seconds`; what is configured is kept. The times rank
plans of one run. They are no predictions: they assume rates of an H100, listed below, and no data
loading.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from miro.training.batch_plan import BatchPlan, Stage, unsupported
from miro.training.config import TrainConfig
from miro.training.flops import training_flops
from miro.training.memory import USABLE, Memory, activation_bytes, estimate, parameter_count

FLOPS = 4e14  # per second that the network's matrix products reach in bf16
LAUNCHES = 120  # kernels of a block's forward and backward pass
LAUNCH = 6e-6  # seconds on the host
HOOK = 2e-5  # seconds of Python for a parameter's gradient at stages 1 to 3
TENSORS = 12  # parameters of a block
NODE = 8  # GPUs of a machine
NVLINK, NETWORK = 2e11, 2.5e10  # bytes per second of a GPU, within a machine and between machines
BANDWIDTH = 3e12  # bytes per second of a GPU's memory
# The paper's data, where no dataset is given: 256 px in a VAE of 8 px and 4 channels, flan-t5-xl.
LATENT, TEXT, REWARDS, WORDS, LEVELS = (4, 32, 32), 2048, 7, 256, 16
STAGES: Sequence[Stage] = (0, 1, 2, 3)


@dataclass(frozen=True)
class Cluster:
    """Ranks and the memory of each.

    Attributes:
        ranks: number of processes, one per GPU.
        capacity: bytes on the device of a rank.
    """

    ranks: int
    capacity: float

    @classmethod
    def parse(cls, text: str) -> Cluster:
        """Read GPUSxGB, such as 8x80.

        Raises:
            ValueError: it is of another form.
        """
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(GB)?", text)
        if found is None:
            raise ValueError(f"--plan {text}: give GPUSxGB, such as 8x80 for 8 GPUs of 80 GB")
        return cls(int(found[1]), int(found[2]) * 1e9)


@dataclass(frozen=True)
class Candidate:
    """A plan with its estimates.

    Attributes:
        plan: of the run.
        memory: of a rank.
        seconds: of an optimizer step.
        problem: why the engine refuses it, or that it does not fit; empty if it is possible.
    """

    plan: BatchPlan
    memory: Memory
    seconds: float
    problem: str


@dataclass(frozen=True)
class Problem:
    """What the estimates depend on: the run, the shapes of its data, and the cluster."""

    config: TrainConfig
    cluster: Cluster
    latent: tuple[int, int, int] = LATENT
    """(C, H, W) of the largest bucket."""
    text: int = TEXT
    """Channels of the text states."""
    rewards: int = REWARDS

    @property
    def parameters(self) -> int:
        """Number of the network's parameters."""
        return parameter_count(self.config.model, self.latent, self.text, self.rewards)


def candidates(problem: Problem) -> list[Candidate]:
    """Estimate every plan that the configuration leaves open, the fastest first.

    Raises:
        ValueError: the batch does not divide among the ranks or into the configured micro-batch.
    """
    parameters = problem.parameters
    found = [_estimate(problem, plan, parameters) for plan in _plans(problem)]
    # Of equally fast plans the one of the lowest stage and the largest micro-batch.
    return sorted(found, key=lambda c: (c.seconds, c.plan.stage, -c.plan.micro_batch))


def choose_plan(problem: Problem) -> tuple[BatchPlan, str]:
    """Return the fastest plan that fits, and a table of it and what was rejected.

    Raises:
        ValueError: no plan fits (the message has the table and the smallest cluster that works), or
            the batch does not divide.
    """
    found = candidates(problem)
    possible = [candidate for candidate in found if not candidate.problem]
    if not possible and len(found) == 1:
        return found[0].plan, table(problem, found, found[0])  # All is configured.
    if not possible:
        raise ValueError(
            f"no plan fits.\n{table(problem, found, None)}\n{_smallest_cluster(problem)}"
        )
    return possible[0].plan, table(problem, found, possible[0])


def table(problem: Problem, found: Sequence[Candidate], chosen: Candidate | None) -> str:
    """Format the chosen plan and, of each other stage and checkpointing, the best one."""
    cluster, config = problem.cluster, problem.config
    lines = [
        f"plan of batch {config.batch:,} on {cluster.ranks} ranks, of which each has "
        f"{USABLE * cluster.capacity / 2**30:.1f} GiB usable; {problem.parameters:,} parameters",
        f"  {'stage':>5} {'micro-batch':>11} {'accumulation':>12} {'checkpointing':>13} "
        f"{'GiB':>7} {'step':>8}",
    ]
    shown = [] if chosen is None else [chosen]
    kinds = {(c.plan.stage, c.plan.activation_checkpointing): c for c in shown}
    for candidate in sorted(found, key=lambda c: (bool(c.problem), c.seconds)):
        kinds.setdefault((candidate.plan.stage, candidate.plan.activation_checkpointing), candidate)
    for candidate in kinds.values():
        plan = candidate.plan
        verdict = "chosen" if candidate is chosen else candidate.problem or "slower"
        lines.append(
            f"  {plan.stage:>5} {plan.micro_batch:>11} {plan.accumulation:>12} "
            f"{'blocks' if plan.activation_checkpointing else 'none':>13} "
            f"{candidate.memory.total / 2**30:>7.1f} {candidate.seconds:>6.2f} s  {verdict}"
        )
    return "\n".join(lines)


def step_seconds(problem: Problem, plan: BatchPlan, parameters: int) -> float:
    """Estimate a step without its update, for comparison with other plans of the same run.

    A micro-batch takes its FLOPs or its kernel launches, whichever is longer. Collectives overlap
    with backward, two thirds of it, and with forward too at stage 3; the rest is added.
    """
    model = problem.config.model
    shapes = (1, *problem.latent), (WORDS, problem.text), (problem.rewards, LEVELS)
    image = training_flops(model, *shapes)
    recomputed = 4 / 3 if plan.activation_checkpointing else 1.0
    forward_backward = recomputed * plan.micro_batch * image / FLOPS
    micro = max(forward_backward, model.depth * LAUNCHES * LAUNCH)
    seconds = plan.accumulation * micro
    if plan.stage:
        seconds += plan.accumulation * model.depth * TENSORS * HOOK * (3 if plan.stage == 3 else 1)
    if plan.world == 1:
        return seconds
    rate = NVLINK if plan.world <= NODE else NETWORK
    # One pass of a ring over all parameters: a reduce-scatter or an all-gather.
    size = 2 if problem.config.precision == "bf16" else 4
    ring = parameters * size / rate * (plan.world - 1) / plan.world
    if plan.stage == 3:
        return seconds + plan.accumulation * max(0.0, 3 * ring - micro)
    # Stage 0 reduces accumulated gradients in their own fp32; stage 2 reduces every micro-batch.
    reductions = plan.accumulation if plan.stage == 2 else 1
    reduced = ring * (4 / size if plan.stage == 0 and plan.accumulation > 1 else 1)
    exposed = reductions * max(0.0, (2 if plan.stage == 0 else 1) * reduced - 2 / 3 * micro)
    return seconds + exposed + (ring if plan.stage else 0.0)


def _plans(problem: Problem) -> Iterator[BatchPlan]:
    config, ranks = problem.config, problem.cluster.ranks
    sharding = config.sharding
    if config.batch % ranks:
        raise ValueError(
            f"batch={config.batch} does not divide among {ranks} processes; the next batch that "
            f"does is {-(-config.batch // ranks) * ranks}"
        )
    share = config.batch // ranks
    micro_batches = [n for n in range(1, share + 1) if share % n == 0]
    if sharding.micro_batch is not None:
        if sharding.micro_batch not in micro_batches:
            raise ValueError(
                f"batch={config.batch} is no multiple of sharding.micro_batch="
                f"{sharding.micro_batch} times {ranks} processes; possible are "
                f"{', '.join(map(str, micro_batches))}"
            )
        micro_batches = [sharding.micro_batch]
    lowest = {"none": 0, "optimizer": 1, "parameters": 3}[sharding.offload]
    stages: Sequence[Stage]
    if sharding.stage != "auto":
        stages = [stage for stage in STAGES if str(stage) == sharding.stage]
    else:  # One rank has nothing to shard.
        stages = STAGES[lowest : 1 if ranks == 1 and lowest == 0 else None]
    checkpointing = sharding.activation_checkpointing
    for stage, micro, recompute in itertools.product(
        stages,
        micro_batches,
        [False, True] if checkpointing is None else [checkpointing],
    ):
        yield BatchPlan(stage, ranks, micro, share // micro, sharding.offload, recompute)


def _estimate(problem: Problem, plan: BatchPlan, parameters: int) -> Candidate:
    config = problem.config
    activations = activation_bytes(config.model, problem.latent, plan, config.precision)
    memory = estimate(parameters, plan, config.precision, activations=activations)
    refused = unsupported(plan, config.optimizer.name, config.precision, config.compile)
    refused = refused.partition(":")[0]
    if not refused and memory.total > USABLE * problem.cluster.capacity:
        refused = "does not fit"
    state = memory.weights + memory.masters + memory.moments + memory.average
    seconds = step_seconds(problem, plan, parameters) + 2 * state / BANDWIDTH
    return Candidate(plan, memory, seconds, refused)


def _smallest_cluster(problem: Problem) -> str:
    """Name the smallest number of GPUs, in powers of two, on which a plan fits."""
    ranks = problem.cluster.ranks
    while (ranks := 2 * ranks) <= problem.config.batch and problem.config.batch % ranks == 0:
        larger = replace(problem, cluster=replace(problem.cluster, ranks=ranks))
        if any(not candidate.problem for candidate in candidates(larger)):
            return f"On {ranks} GPUs of this size one fits."
    return "Try a smaller batch, sharding.offload=optimizer or parameters, or compile=False."
