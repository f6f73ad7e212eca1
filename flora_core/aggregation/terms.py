"""Checks of a round's updates, and its terms: the p_k s_k B_k A_k that every strategy starts from.

Letters: K in_features, N out_features, R one client's rank, P the sum of ranks.
"""

from __future__ import annotations

import math
import numbers
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..adapters import ClientUpdate
from ..common import check_tensor, listed, require

Stack = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Term(NamedTuple):
    """One client's part in one module: ``share * scaling * B_RN.T @ A_RK``.

    Example:
        >>> from flora_core.aggregation import Term, stack_of
        >>> term = Term("a", share=0.25, scaling=2.0, A_RK=torch.ones(2, 8), B_RN=torch.ones(2, 4))
        >>> stack_of([term])[2]
        tensor([0.5000, 0.5000], dtype=torch.float64)
    """

    client: str
    share: float
    scaling: float
    A_RK: torch.Tensor
    B_RN: torch.Tensor


def check_updates(updates: Sequence[ClientUpdate]) -> None:
    """Refuse a round that cannot be aggregated, naming client, module, what was expected and what came.

    Raises:
        ValueError: For no updates, a name that comes twice, several bases, a bad weight, ranks or shapes that do not
            fit together, values that are not finite, or tensors of one module on several devices.
        TypeError: For anything that is not a ``ClientUpdate`` of floating-point tensors.
    Example:
        >>> from flora_core.aggregation import check_updates
        >>> check_updates([updates[0], updates[0]])
        Traceback (most recent call last):
        ValueError: client names must differ, got more than one update of 'a'
    """
    require(len(updates) > 0, "updates must hold at least one ClientUpdate, got none; skip the round instead")
    for update in updates:
        if not isinstance(update, ClientUpdate):
            raise TypeError(f"updates must hold ClientUpdate objects, got {type(update).__name__}")
    twice = [name for name, count in Counter(update.client for update in updates).items() if count > 1]
    require(not twice, f"client names must differ, got more than one update of {', '.join(map(repr, twice))}")
    _check_bases(updates)
    check_weights(updates)
    for update in updates:
        check_adapters(update)
    _check_shapes(updates)


def _check_bases(updates: Sequence[ClientUpdate]) -> None:
    """Check that no client is known to have trained on another base; equal shapes would hide it."""
    bases: dict[str, list[str]] = defaultdict(list)
    for update in updates:
        if update.base is not None:
            bases[update.base].append(update.client)
    parts = [f"{base!r} from {_names(clients)}" for base, clients in bases.items()]
    require(
        len(bases) <= 1,
        f"updates must be of one base model, got {'; '.join(parts)}; if these name the same one, set update.base alike",
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_weights(updates: Sequence[ClientUpdate]) -> None:
    """Check that each weight of a round is a number of at least 0, and that they have a sum to be divided by.

    Example:
        >>> from flora_core.aggregation import check_weights
        >>> updates[0].weight = -1.0
        >>> check_weights(updates)
        Traceback (most recent call last):
        ValueError: client 'a': weight must be a finite number of at least 0, got -1.0
    """
    for update in updates:
        require(
            _is_number(update.weight) and math.isfinite(update.weight) and update.weight >= 0,
            f"client {update.client!r}: weight must be a finite number of at least 0, got {update.weight!r}",
        )
    require(
        any(update.weight > 0 for update in updates),
        "the weights of the round are all zero; give at least one client a weight above 0",
    )
    require(
        math.isfinite(sum(float(update.weight) for update in updates)),
        "the weights of the round must have a finite sum; divide them all by one number",
    )


def check_adapters(update: ClientUpdate) -> None:
    """Check one client's factors: floating-point, finite, one rank for A and B, a scaling for each.

    Example:
        >>> from flora_core.aggregation import check_adapters
        >>> check_adapters(flora.ClientUpdate("a", {"q_proj": (torch.ones(2, 8), torch.ones(3, 4))}, {"q_proj": 1.0}))
        Traceback (most recent call last):
        ValueError: client 'a', module 'q_proj': A (R, K) and B (R, N) must have one rank, got (2, 8) and (3, 4);...
    """
    who = f"client {update.client!r}"
    if not isinstance(update.adapters, Mapping) or not isinstance(update.scaling, Mapping):
        kinds = " and ".join(type(value).__name__ for value in (update.adapters, update.scaling))
        raise TypeError(f"{who}: adapters and scaling must be mappings by module, got {kinds}")
    odd = sorted(set(update.adapters) ^ set(update.scaling))
    require(not odd, f"{who}: scaling must have the modules of adapters, got one without the other for {odd[:3]}")
    for module, pair in update.adapters.items():
        where = f"{who}, module {module!r}"
        require(
            isinstance(pair, Sequence) and len(pair) == 2,
            f"{where}: adapters must hold a pair (A, B), got {_told(pair)}",
        )
        A_RK, B_RN = pair
        check_tensor(f"{where}: A", A_RK, (None, None))
        check_tensor(f"{where}: B", B_RN, (None, None), like=("A", A_RK))
        require(
            A_RK.shape[0] == B_RN.shape[0],
            f"{where}: A (R, K) and B (R, N) must have one rank, got {tuple(A_RK.shape)} and {tuple(B_RN.shape)};"
            " B is stored R x N, the transpose of PEFT's lora_B",
        )
        scaling = update.scaling[module]
        if not (_is_number(scaling) or (isinstance(scaling, torch.Tensor) and scaling.numel() == 1)):
            raise TypeError(f"{where}: scaling must be a number, got {scaling!r}")
        require(
            math.isfinite(scaling) and _is_finite(A_RK) and _is_finite(B_RN),
            f"{where}: A, B and scaling must be finite, got NaN or infinity; leave this client out of the round",
        )


def _told(pair: Any) -> str:
    return f"{len(pair)} of them" if isinstance(pair, Sequence) else type(pair).__name__


def _is_finite(tensor: torch.Tensor) -> bool:
    # NaN and infinity survive a sum, which costs one pass and no mask; a sum of finite numbers may still overflow.
    return math.isfinite(float(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _check_shapes(updates: Sequence[ClientUpdate]) -> None:
    """Check that one module has one (K, N) and one device for all its clients."""
    seen: dict[str, dict[tuple[int, int, torch.device], list[str]]] = defaultdict(lambda: defaultdict(list))
    for update in updates:
        for module, (A_RK, B_RN) in update.adapters.items():
            seen[module][A_RK.shape[1], B_RN.shape[1], A_RK.device].append(update.client)
    for module, shapes in seen.items():
        parts = [f"K={k}, N={n} on {device} from {_names(names)}" for (k, n, device), names in shapes.items()]
        require(
            len(shapes) == 1,
            f"module {module!r} must have one shape and one device for all clients, got {'; '.join(parts)}",
        )


def check_equal_ranks(updates: Sequence[ClientUpdate], strategy: str, remedy: str) -> None:
    """Check that the clients that adapt a module do so with one rank."""
    for module, terms in round_terms(updates).items():
        ranks: dict[int, list[str]] = defaultdict(list)
        for term in terms:
            ranks[term.A_RK.shape[0]].append(term.client)
        parts = [f"{rank} from {_names(names)}" for rank, names in sorted(ranks.items())]
        require(
            len(ranks) == 1,
            f"strategy {strategy!r} needs equal ranks, got {'; '.join(parts)} for module {module!r}; {remedy}",
        )


def check_same_modules(updates: Sequence[ClientUpdate], strategy: str, remedy: str) -> None:
    """Check that every client adapts the same modules."""
    first, *others = [({module for module, rank in one.ranks.items() if rank}, one.client) for one in updates]
    for modules, client in others:
        odd = sorted(modules ^ first[0])
        require(
            not odd,
            f"strategy {strategy!r} needs clients that adapt the same modules, got {_names(odd)} in only one of "
            f"{first[1]!r} and {client!r}; {remedy}",
        )


def _names(names: Sequence[str]) -> str:
    return listed(map(repr, names), 3)


def shares(updates: Sequence[ClientUpdate]) -> dict[str, float]:
    """Normalise the weights of a round: p_k = n_k / sum n, whatever the order of the clients."""
    total = math.fsum(update.weight for update in updates)
    return {update.client: update.weight / total for update in updates}


def round_terms(updates: Sequence[ClientUpdate]) -> dict[str, list[Term]]:
    """List the terms of the exact sum per module; a client of rank 0 or weight 0 adds nothing, so has no term.

    Example:
        >>> from flora_core.aggregation import round_terms
        >>> [[(term.client, term.share) for term in terms] for terms in round_terms(updates).values()]
        [[('a', 0.25), ('b', 0.75)]]
    """
    share = shares(updates)
    terms: dict[str, list[Term]] = defaultdict(list)
    for update in updates:
        for module, (A_RK, B_RN) in update.adapters.items():
            if A_RK.shape[0] and share[update.client] > 0:
                pair = A_RK.detach(), B_RN.detach()
                terms[module].append(Term(update.client, share[update.client], update.scaling[module], *pair))
    return dict(terms)


def exact_stacks(terms: Mapping[str, Iterable[Term]]) -> dict[str, Stack]:
    """Stack the terms of each module: ``B_PN.T @ diag(coef_P) @ A_PK`` is exactly their sum.

    Returns:
        Module -> (A_PK, B_PN, coef_P in float64). A and B are views of the updates, without a copy, where the
        clients' factors lie one behind another in one buffer, as in an ``AdapterBank``.
    """
    return {module: stack_of(list(parts)) for module, parts in terms.items()}


def stack_of(terms: Sequence[Term]) -> Stack:
    """Stack one module's terms, see ``exact_stacks``.

    Example:
        >>> from flora_core.aggregation import round_terms, stack_of
        >>> [A_PK, B_PN, coef_P] = stack_of(round_terms(updates)["model.layers.0.self_attn.q_proj"])
        >>> A_PK.shape, coef_P
        (torch.Size([5, 16]), tensor([0.5000, 0.5000, 0.7500, 0.7500, 0.7500], dtype=torch.float64))
    """
    coef = [term.share * term.scaling for term in terms for _ in range(term.A_RK.shape[0])]
    coef_P = torch.tensor(coef, dtype=torch.float64, device=terms[0].A_RK.device)
    return stack_rows([term.A_RK for term in terms]), stack_rows([term.B_RN for term in terms]), coef_P


def join_stacks(stacks: Sequence[Stack]) -> Stack:
    """Stack several stacks in float64: the product is the sum of theirs.

    Example:
        >>> from flora_core.aggregation import join_stacks
        >>> one, other = [(torch.eye(2), torch.eye(2), torch.tensor([c, c])) for c in (1.0, -1.0)]
        >>> A, B, coef = join_stacks([one, other])
        >>> coef
        tensor([ 1.,  1., -1., -1.], dtype=torch.float64)
    """
    A, B, coef = zip(*stacks, strict=True)
    return tuple(torch.cat([part.double() for part in parts]) for parts in (A, B, coef))  # pyright: ignore


def stack_rows(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Concatenate rows; a view where the parts already are consecutive rows of one buffer."""
    first, rows = parts[0], sum(part.shape[0] for part in parts)
    expected = first.storage_offset()
    for part in parts:
        same = part.dtype == first.dtype and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not same or part.stride() != first.stride() or part.storage_offset() != expected:
            return torch.cat(list(parts))
        expected += part.shape[0] * part.stride(0)
    return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
