"""The ops as ``torch.library`` ops: registered right, traced whole, and out of the way of eager calls.

Letters: M packed tokens, K in_features, N out_features, R one client's rank, C clients.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import flora_core as flora
from flora_core import LoraWeights, MergeItem, Segments, cohort_adamw_, lora_linears, stacked_merge_many_, testing
from flora_core.data.pack import lay_out
from flora_core.ops import api
from flora_core.testing import LINEAR_SHAPES, MERGE_SHAPES, make_linear, make_merge
from tests.support import models

MIXED, RANK_0 = LINEAR_SHAPES[0], LINEAR_SHAPES[4]
OPS = torch.ops.flora


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function: Any) -> Any:
    """Traced whole, run by autograd's own graph: no compiler is needed."""
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def linears(dropout: bool, tables: bool = False) -> tuple[Any, ...]:
    """Arguments of the registered op for two targets that share x, factors and x asking for gradients."""
    inputs = make_linear(RANK_0, dropout=dropout)
    x, A, B = (tensor.detach().requires_grad_() for tensor in (inputs.x, inputs.A, inputs.B))
    other = torch.randn(24, 32, generator=torch.Generator().manual_seed(1))
    B2 = torch.randn(inputs.ranks.total, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    seeds = (inputs.dropout_seed_C or []) * 2
    numbers: tuple[Any, ...] = (
        inputs.scaling_C * 2,
        [],
        inputs.dropout_C or [],
        None,
        seeds,
        [],
        inputs.row_C or [],
        None,
    )
    if tables:
        as_tables = [torch.tensor(inputs.scaling_C)] * 2, [torch.tensor(inputs.dropout_seed_C)] * 2
        numbers = [], as_tables[0], [], torch.tensor(inputs.dropout_C), [], as_tables[1], [], torch.tensor(inputs.row_C)
    weights, biases = [inputs.weight, other], [inputs.bias, None]
    ranks = list(inputs.ranks.lengths) * 2
    return x, weights, biases, [A, A], [B, B2], list(inputs.tokens.lengths), ranks, *numbers, "reference", "auto"


@pytest.mark.parametrize("options", [(False, False), (True, False), (True, True)], ids=["", "dropout", "tables"])
def test_lora_linears_is_registered_right(options):
    torch.library.opcheck(OPS.lora_linears, linears(*options))


def test_the_backward_op_is_registered_right():
    x, weights, *rest = linears(True)
    found = OPS.lora_linears(x, weights, *rest)
    dys, s_flats = [torch.ones_like(y) for y in found[:2]], [s.detach() for s in found[2:]]
    fixed = [[t.detach() for t in part] if i in (1, 2) else part for i, part in enumerate(rest)]
    for wants_x, wants in ((True, [True, True]), (False, [True, False]), (True, [False, False])):
        torch.library.opcheck(OPS.lora_linears_backward, (dys, s_flats, wants_x, wants, x.detach(), weights, *fixed))


@pytest.mark.parametrize("low_bits", [False, True], ids=["", "low-bits"])
def test_the_merge_is_registered_right(low_bits):
    items = [make_merge(replace(case, dtype=torch.bfloat16)) for case in MERGE_SHAPES[:2]]
    columns = [[getattr(item, name) for item in items] for name in ("weight", "A", "B", "coef")]
    lows = [torch.zeros(items[0].weight.shape, dtype=torch.int16)] if low_bits else []
    low_of = [0, -1] if low_bits else [-1, -1]
    torch.library.opcheck(OPS.stacked_merge_many_, (*columns, lows, low_of, "nearest", None, "float32", "reference"))


def test_adamw_is_registered_right():
    buffers = [torch.rand(7) for _ in range(4)]
    hyper_CH = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.1, 3, 0.5]] * 2)
    torch.library.opcheck(OPS.cohort_adamw_, (*buffers, [4, 1, 2], hyper_CH, [0, 1, 0], "reference"))


@pytest.mark.parametrize("dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compiled_linear_gives_the_same_bits(dtype, dropout, monkeypatch):
    inputs = make_linear(replace(MIXED, dtype=dtype), dropout=dropout, masters=True)
    eager = testing.run_linear(inputs)
    monkeypatch.setattr(api, "lora_linear", compiled(api.lora_linear))
    for name, result in testing.run_linear(inputs).items():
        assert torch.equal(result, eager[name]), name


def test_targets_that_share_x_compile_to_one_op():
    inputs = make_linear(MIXED, dropout=True)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    target = LoraWeights(inputs.weight, inputs.bias, inputs.A, inputs.B, inputs.ranks, inputs.scaling_C)

    def run(x: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
        options: dict[str, Any] = dict(dropout_C=inputs.dropout_C, dropout_seed_C=[seeds, seeds + 1])
        q, k = lora_linears(torch.tanh(x), [target, target], inputs.tokens, **options)
        return (q * k).sum(-1)

    seeds = torch.tensor(inputs.dropout_seed_C)
    out = torch.compile(run, fullgraph=True, backend=keep)(inputs.x, seeds)
    assert torch.equal(out, run(inputs.x, seeds))
    ((graph,),) = [graphs]
    assert [str(node.target) for node in graph.graph.nodes if "flora" in str(node.target)] == ["flora.lora_linears"]


def test_other_tokens_and_seeds_are_traced_once_more_and_then_never():
    """Lengths and keys become symbols; each step of a training run would be compiled anew otherwise."""
    inputs, graphs = make_linear(MIXED, dropout=True), []

    def run(tokens: Segments, seeds: list[int]) -> torch.Tensor:
        return api.lora_linear(
            inputs.x[: tokens.total], inputs.weight, inputs.bias, inputs.A, inputs.B, tokens, inputs.ranks,
            inputs.scaling_C, dropout_C=inputs.dropout_C, dropout_seed_C=seeds,
        )  # fmt: skip

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph

    traced = torch.compile(run, fullgraph=True, backend=keep)
    for step in range(6):
        tokens, seeds = Segments([20 - step, 5 - step // 2, 12 - 2 * step]), [2**60 + step, 7 * step + 5, 3 + step]
        assert torch.equal(traced(tokens, seeds), run(tokens, seeds))
    assert len(graphs) <= 3


@pytest.mark.parametrize("low_bits", [False, True], ids=["", "low-bits"])
def test_a_compiled_merge_writes_the_same_bits(low_bits):
    written = []
    for wrap in (lambda f: f, compiled):
        cases = [make_merge(replace(case, dtype=torch.bfloat16)) for case in MERGE_SHAPES]
        lows = [torch.ones(one.weight.shape, dtype=torch.int16) if low_bits else None for one in cases]
        items = [MergeItem(one.weight, one.A, one.B, one.coef, low) for one, low in zip(cases, lows, strict=True)]
        wrap(lambda items: stacked_merge_many_(items, accumulate="float64"))(items)
        written.append([one.weight for one in cases] + [low for low in lows if low is not None])
    assert all(torch.equal(eager, traced) for eager, traced in zip(*written, strict=True))


def test_a_compiled_adamw_writes_the_same_bits():
    written, segments = [], Segments([4, 1, 2])
    hyper_CH = torch.tensor([[0.1, 0.9, 0.999, 1e-8, 0.1, 3, 0.5]] * 2)
    for wrap in (lambda f: f, compiled):
        random = torch.Generator().manual_seed(0)
        buffers = [torch.rand(7, generator=random) for _ in range(4)]
        wrap(lambda p, g, m, v: cohort_adamw_(p, g, m, v, segments, hyper_CH, owner=[0, 1, 0]))(*buffers)
        written.append(buffers)
    assert all(torch.equal(eager, traced) for eager, traced in zip(*written, strict=True))


def test_what_is_wrong_is_said_while_tracing():
    inputs = make_linear(MIXED)

    def run(x: torch.Tensor) -> torch.Tensor:
        return api.lora_linear(
            x, inputs.weight, inputs.bias, inputs.A, inputs.B, inputs.tokens, inputs.ranks, inputs.scaling_C
        )

    with pytest.raises(Exception, match=r"tokens must cover the M=36 rows of x_MK, got 37 in 3 segments"):
        compiled(run)(inputs.x[1:])


def test_an_eager_call_does_not_go_through_the_dispatcher(monkeypatch):
    calls: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = make_linear(MIXED)
    with Watch():
        testing.run_linear(inputs)
    assert calls
    assert not [name for name in calls if name.startswith("flora")]


def test_a_whole_model_with_a_cohort_is_one_graph():
    model = models.tiny("llama", torch.float32).eval()
    adapters = [flora.AdapterConfig(4, 8, dropout=0.1), flora.AdapterConfig(2, 8)]
    clients = [flora.ClientSpec(name, adapter=adapter) for name, adapter in zip("ab", adapters, strict=True)]
    cohort = flora.attach(model, clients, ["q_proj", "v_proj", "up_proj"])
    cohort.parameters()
    rows = models.examples(3, (5, 7))
    batch = lay_out([rows[:1], rows[1:]], packs=True)
    with cohort.batch(batch.tokens, sequences=batch.sequences, dropout_step=0):
        eager, traced = (
            run(**batch.inputs, use_cache=False).last_hidden_state for run in (model.model, compiled(model.model))
        )
    assert torch.equal(eager, traced)
    wanted, found = (torch.autograd.grad(hidden.sum(), cohort.parameters()) for hidden in (eager, traced))
    assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True))
