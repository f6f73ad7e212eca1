"""One exact PEFT adapter on a run's original base: of a client's round, or of the global model after a round.

A client of round t trained on ``W_0 + D_1 + .. + D_(t-1)``, with D_i what round i added to the base. Its adapter for
W_0 has the rows of all these sums beside its own:

    A = [A_1; ..; A_(t-1); A_client]      B = [c_1 B_1; ..; c_(t-1) B_(t-1); s B_client]

The global model's has those of the global adapter last, for strategies that keep one. Rows
that cancel are left out. Where more are left than the matrix has, the sum itself takes their place, and where they
depend on each other its singular triplets: fewer rows with the same product.

Letters: K in_features, N out_features, P the sum of ranks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..adapters import Base, RoundResult, place_of, save_stacked_adapter, values
from ..aggregation import Stack, as_stack, balanced, full_rank, join_stacks, stack_svd
from ..common import check_choice, require
from ..merge import LAYOUTS, VLLM_RANKS, adapter_stack, of_one_rank
from ..runs import STATE
from .exchange import dense_stack
from .replay import SavedRound, read_rounds, replay

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class RebaseReport:
    """The adapter that was written.

    Args:
        out: The folder.
        base: The name or folder of the original base; None where the run's model had none.
        ranks: Module -> rank.
        size_bytes: Of all files.
        error: How far the sums are from the change of the run's own weights, at 256 values of each, relative to that
            change: the rounding of the weights' dtype. None where the base never changed, or nothing is kept of it.
    Example:
        >>> config = flora.FederationConfig(rounds=1, out="run")
        >>> result = flora.Federation(model, tokenizer, clients, config=config).run()
        >>> report: flora.RebaseReport = flora.rebase_adapter("run", "adapter")
        >>> max(report.ranks.values()), report.error < 1e-4
        (9, True)
    """

    out: Path
    base: str | None
    ranks: Mapping[str, int]
    size_bytes: int
    error: float | None


def rebase_adapter(
    run_dir: str | os.PathLike[str],
    out: str | os.PathLike[str],
    round: int | None = None,
    client: str | None = None,
    *,
    layout: str = "peft",
    progress: Callable[[int, int], None] | None = None,
) -> RebaseReport:
    """Write one PEFT adapter on the base that a run began with, exact up to the rounding of its factors.

    Args:
        run_dir: The ``out`` of a run, finished or not, whose adapters were saved.
        out: A new folder, or one that holds an adapter and nothing else, which is replaced.
        round: The round; the newest unless given.
        client: Whose adapter of that round; the global model after it unless given.
        layout: ``peft``, or ``vllm``: one rank that vLLM serves for all modules, scale 1.
        progress: Called with modules done and modules in all.
    Returns:
        What was written, and how it agrees with the run's own weights.
    Raises:
        FileNotFoundError: If ``run_dir`` holds no round of a run.
        ValueError: If round or client is unknown, an adapter is missing or damaged, the run was private, or the sums
            are not the change of the run's weights; nothing is written then.
        SaveError: If writing fails; what was there is unchanged.
    Deterministic: yes. Source: arXiv 2409.05976, eq. 5.
    Example:
        >>> config = flora.FederationConfig(rounds=2, out="run")
        >>> result = flora.Federation(model, tokenizer, clients, config=config).run()
        >>> report = flora.rebase_adapter("run", "adapter-a", round=1, client="a")
        >>> flora.load_peft_adapter("adapter-a").ranks == report.ranks
        True
    """
    check_choice("layout", layout, LAYOUTS)
    run = Path(run_dir)
    rounds = read_rounds(run)
    number = rounds[-1].number if round is None else round
    require(
        type(number) is int and 1 <= number <= len(rounds),
        f"round must be one of the {len(rounds)} rounds that {run} holds, got {number!r}",
    )
    update = None if client is None else rounds[number - 1].update(client)
    before = rounds[: number if update is None else number - 1]
    change = replay(before)
    own = None if update is None else {m: adapter_stack(update, m, _CPU) for m in update.adapters}
    error = _compare(change.base, before, rounds)
    parts = change.stacks(own)
    stacks = {}
    for count, (module, some) in enumerate(parts.items()):
        stack = _smallest(some)
        stacks |= {module: stack} if stack[0].shape[0] else {}
        (progress or (lambda *_: None))(count + 1, len(parts))
    require(bool(stacks), f"the global model after round {number} of {run} is the original base: no adapter to write")
    if layout == "vllm":
        stacks = of_one_rank(stacks, f"no adapter of rank {VLLM_RANKS[-1]} has this product; serve model/ instead")
    base = _original(rounds)
    config = next((found for one in rounds if (found := one.config())), {})
    conv1d = config.get("fan_in_fan_out") is True
    target = Path(out)
    save_stacked_adapter(
        RoundResult(stacks),
        target,
        base_model=base.name,
        fan_in_fan_out=conv1d,
        trained_on=base if base.weights else None,
    )
    size = sum(path.stat().st_size for path in target.iterdir())
    return RebaseReport(target, base.name, {m: len(A_PK) for m, (A_PK, *_) in stacks.items()}, size, error)


def _smallest(parts: Sequence[Stack]) -> Stack:
    """One stack of the sum, of as few rows as have its product, float32."""
    A_PK, B_PN, coef_P = _without_equal_rows(join_stacks(parts))
    stack = A_PK, B_PN * coef_P[:, None], torch.ones_like(coef_P)
    K, N = A_PK.shape[1], B_PN.shape[1]
    if len(A_PK) > min(N, K):
        # The product itself beside unit rows, which costs no decomposition.
        stack = dense_stack(stack[1].T @ A_PK)
    # Rows that are independent on both sides have a product of rank P: nothing is smaller.
    if not all(full_rank(rows) for rows in stack[:2]):
        A, B = balanced(stack_svd(stack))
        stack = as_stack(A, B) if len(A) < len(stack[0]) else stack
    return stack[0].float(), stack[1].float(), stack[2]


def _without_equal_rows(stack: Stack) -> Stack:
    """Take equal rows together: what a round takes out of the base for the global adapter, that adapter puts back."""
    A_PK, B_PN, coef_P = stack
    rows, place_P = torch.unique(torch.cat([A_PK, B_PN], 1), dim=0, return_inverse=True)
    if len(rows) == len(A_PK):
        return stack
    coef = coef_P.new_zeros(len(rows)).index_add_(0, place_P, coef_P)
    A, B = rows[coef != 0].split([A_PK.shape[1], B_PN.shape[1]], 1)
    return A, B, coef[coef != 0]


def _original(rounds: Sequence[SavedRound]) -> Base:
    """The base before the first round, as far as clients that trained on it say."""
    name, weights = None, {}
    for one in rounds:
        first = [base for base in one.bases() if base.round == 0]
        for base in first:
            name, weights = base.name, {**weights, **base.weights}
        if not first:
            break
    if not weights:
        # An earlier version wrote the name of the original base into every adapter.
        name = next((one.config().get("base_model_name_or_path") for one in rounds if one.clients), None)
    return Base(name, 0, weights)


def _compare(
    base: Mapping[str, Sequence[Stack]], before: Sequence[SavedRound], rounds: Sequence[SavedRound]
) -> float | None:
    """The distance of sums from the change of the run's weights, at the values that the run keeps of them.

    Raises:
        ValueError: If rounding does not explain it.
    """
    if not base:
        return None
    first, last = _original(rounds).weights, _weights_after(len(before), rounds)
    difference = moved = size = eps = 0.0
    for module in sorted(set(base) & set(first) & set(last)):
        old, new = first[module].double(), last[module].double()
        eps = max(eps, torch.finfo(first[module].dtype).eps)
        A_PK, B_PN, coef_P = join_stacks(base[module])
        row, column = place_of(B_PN.shape[1], A_PK.shape[1])
        added = (B_PN[:, row] * coef_P[:, None] * A_PK[:, column]).sum(0)
        difference += float((new - old - added).square().sum())
        moved += float(added.square().sum())
        size += float(new.square().sum())
    if not size:
        return None
    # Every round is rounded once.
    bound = 2 * len(before) * eps * size**0.5 + 1e-5 * moved**0.5
    require(
        difference**0.5 <= bound,
        f"the adapters saved in {before[0].folder.parent} do not give the weights of the run: they differ by "
        f"{difference**0.5:.1e}, where rounding explains {bound:.1e}; strategy or files are not those of the run",
    )
    return (difference / moved) ** 0.5 if moved else None


def _weights_after(number: int, rounds: Sequence[SavedRound]) -> Mapping[str, torch.Tensor]:
    """Values of the run's weights after a round: from the next round's adapters, or from its own state."""
    if number < len(rounds) and (bases := rounds[number].bases()):
        return {module: kept for base in bases for module, kept in base.weights.items()}
    path, prefix = rounds[number - 1].folder / STATE, "server/weights/"
    if not path.is_file():
        return {}
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (it is no mapping)
        return {name.removeprefix(prefix): values(file.get_tensor(name)) for name in names}
