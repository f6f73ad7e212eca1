"""Where the time and the memory of a cohort's training step go, and which part is farthest from its limit.

The step is timed as it is, in turns with the frozen base; then one step is profiled, and its shares divide the time.
A backward operation belongs to the part whose forward operation made it. Letters: M packed tokens, N out_features,
K in_features, V vocabulary, H hidden size.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch.autograd.profiler import record_function

from bench.cases.grid import TARGETS, Case
from bench.cases.rivals import FROZEN
from bench.cases.steps import RIVALS, Step
from bench.harness.protocol import RESULTS, SMOKE, Result, Timing, machine_folder
from bench.harness.rates import rates
from flora_core.ops.backends import resolve, without_checks
from flora_core.training import steps
from flora_core.training.optimizer import CohortAdamW

PARTS = ("base products", "LoRA", "attention", "norm", "elementwise", "loss", "optimizer", "data", "host")
LINEAR = "linear"  # a layer with or without adapters: its products are the base's, the rest is LoRA's
_MARK = "flora::"
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul", "aten::bmm")
_KERNELS = ("shrink", "shrink_many", "expand_", "expand_many_", "wgrad", "linear_lora", "linear")
CPU_LAYERS = 10


def part_of_module(module: torch.nn.Module) -> str | None:
    """The part that a module's own operations belong to."""
    name = type(module).__name__
    if name in ("MultiLoRALinear", "Linear", "Conv1D"):
        return LINEAR
    if name.endswith("Norm"):
        return "norm"
    if name.endswith("Attention") or "Rotary" in name:
        return "attention"
    return "elementwise" if name.endswith(("MLP", "DecoderLayer", "Model")) else None


class Marks:
    """Opens a named range around every part, for the profiler and for what autograd keeps meanwhile."""

    def __init__(self, step: Step):
        self.step, self.stack = step, []
        self.saved: Counter[str] = Counter()
        self._seen: dict[int, torch.Tensor] = {}
        fixed = [*step.packed.model.parameters(), step.packed.cohort.bank.param]
        self._fixed = {tensor.untyped_storage().data_ptr() for tensor in fixed}

    def enter(self, part: str) -> None:
        mark = record_function(_MARK + part)
        mark.__enter__()
        self.stack.append((part, mark))

    def leave(self) -> None:
        self.stack.pop()[1].__exit__(None, None, None)

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(work)
        def run(*args: Any, **options: Any) -> Any:
            self.enter(part)
            try:
                return work(*args, **options)
            finally:
                self.leave()

        return run

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count a storage that autograd keeps, once, for the part that is open."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._fixed and storage.data_ptr() not in self._seen:
            self._seen[storage.data_ptr()] = tensor
            self.saved[self.stack[-1][0] if self.stack else "host"] += storage.nbytes()
        return tensor

    @contextmanager
    def on(self) -> Iterator[None]:
        kernels, _ = resolve(self.step.packed.cohort.backend, "shrink", self.step.model.get_input_embeddings().weight)
        owners = {kernels, without_checks(kernels)}
        places = [(owner, name, "LoRA") for owner in owners for name in _KERNELS if hasattr(owner, name)]
        places += [(steps, "lay_out", "data"), (steps, "client_losses", "loss")]
        places += [(CohortAdamW, name, "optimizer") for name in ("step", "grad_norms", "zero_grad")]
        with ExitStack() as stack:
            for owner, name, part in places:
                stack.enter_context(mock.patch.object(owner, name, self.around(part, getattr(owner, name))))
            for module in self.step.packed.model.modules():
                part = part_of_module(module)
                if part:
                    before = module.register_forward_pre_hook(lambda *_, p=part: self.enter(p))
                    after = module.register_forward_hook(lambda *_: self.leave(), always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor))
            yield
        self._seen.clear()


def seconds_of_parts(events: Sequence[Any], whole_us: float, gpu: bool) -> dict[str, float]:
    """Share the profiled events' own time among the parts; what no event covers is the host's."""
    made: dict[int, str] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        if event.sequence_nr >= 0 and not _is_backward(event):
            made[event.sequence_nr] = _above(event, made)
    found: defaultdict[str, float] = defaultdict(float)
    for event in events:
        spent = event.self_device_time_total if gpu else event.self_cpu_time_total
        part = _above(event, made)
        if part == LINEAR:
            part = "base products" if event.name in _PRODUCTS else "LoRA"
        found["host" if event.name.startswith(_MARK) and not gpu and part != "LoRA" else part] += spent
    found["host"] += max(0.0, whole_us - sum(found.values()))
    total = sum(found.values()) or 1.0
    return {part: found[part] / total for part in PARTS}


def _is_backward(event: Any) -> bool:
    while event is not None:
        if "evaluate_function" in event.name or event.name.endswith("Backward0"):
            return True
        event = event.cpu_parent
    return False


def _above(event: Any, made: dict[int, str]) -> str:
    """The part of the nearest range that an event lies in, forward or of the operation that backward undoes."""
    while event is not None:
        name = event.name
        if name.startswith(_MARK):
            return name.removeprefix(_MARK)
        if "LoraLinears" in name:
            return LINEAR
        if "ChunkedLoss" in name:
            return "loss"
        if "evaluate_function" in name or name.endswith("Backward0"):
            return made.get(event.sequence_nr, "host") if event.sequence_nr >= 0 else "host"
        event = event.cpu_parent
    return "host"


def limits(step: Step, rate: dict[str, float]) -> dict[str, float]:
    """Seconds that no implementation can beat: operations at the measured rate, or bytes at the copy's."""
    case, shapes, layers = step.case, step.case.shapes, step.layers
    M, T, size, H = step.tokens, case.tokens, step.dtype.itemsize, step.case.shapes.hidden
    names = TARGETS["all"]
    products = sum(2 * M * N * K for N, K in map(shapes.linear, names)) * layers
    pairs = sum(case.tokens * rank for rank in case.ranks)
    branch = sum(2 * pairs * (N + K) for N, K in map(shapes.linear, TARGETS[case.targets])) * layers
    # Two products forward, five backward (one of them again), over the causal half.
    attention = len(case.ranks) * layers * 7 * T * T * H
    head = 4 * M * shapes.vocab * H
    flops, copied = rate["matrix_flops_per_s"], rate["copy_bytes_per_s"]
    return {
        "base products": 2 * products / flops,
        "LoRA": 3 * branch / flops,
        "attention": attention / flops,
        "norm": (2 * layers + 1) * 5 * M * H * size / copied,
        "elementwise": layers * (8 * M * shapes.intermediate + 6 * M * H) * size / copied,
        "loss": head / flops,
        "optimizer": 7 * 4 * step.packed.cohort.bank.param.numel() / copied,
        "data": 0.0,
        "host": 0.0,
    }


def measure(step: Step, rounds: int = 3) -> dict[str, Any]:
    """Times of the step and of the frozen base, shares by part, and bytes by part."""
    frozen = next(rival for rival in RIVALS if rival.name == FROZEN).make(step)
    times = {"step": Timing(), "frozen": Timing()}
    marks = Marks(step)
    gpu = step.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * gpu
    with step.packed.running():
        for _ in range(rounds + 1):
            times["frozen"].run(frozen)
            times["step"].run(step.packed.step)
        with marks.on(), torch.profiler.profile(activities=activities) as profile:
            with record_function("whole"):
                step.packed.step()
            if gpu:
                torch.cuda.synchronize()
        optimizer = 3 * step.packed.cohort.bank.param.numel() * step.packed.cohort.bank.param.element_size()
    events: Any = profile.events()
    whole = next(event for event in events if event.name == "whole")
    inside = [event for event in events if event.name not in ("whole", "ProfilerStep")]
    spent = whole.device_time_total if gpu else whole.cpu_time_total
    for timing in times.values():
        del timing.wall_s[0], timing.cpu_s[0]
    saved = {("LoRA" if part == LINEAR else part): 0 for part in marks.saved}
    for part, size in marks.saved.items():
        saved["LoRA" if part == LINEAR else part] += size
    return {
        "seconds": times["step"].summary()["median_s"],
        "frozen_seconds": times["frozen"].summary()["median_s"],
        "shares": seconds_of_parts(inside, spent, gpu),
        "saved_bytes": saved,
        "weights_bytes": sum(p.numel() * p.element_size() for p in step.model.parameters()),
        "adapter_bytes": step.packed.cohort.bank.param.numel() * step.packed.cohort.bank.param.element_size(),
        "optimizer_bytes": optimizer,
    }


def largest_gap(found: dict[str, Any], limit: dict[str, float]) -> tuple[str, float]:
    """The part that loses most seconds against its limit."""
    gaps = {part: share * found["seconds"] - limit[part] for part, share in found["shares"].items()}
    part = max(gaps, key=lambda name: gaps[name])
    return part, gaps[part]


def explain(layers: int | None = None, tokens: int | None = None, words: Sequence[str] = ()) -> tuple[list[Any], str]:
    """Profile a step; tables of its time and memory, and a sentence that names the largest gap.

    Args:
        layers, tokens: Of the model, and of each client; a third of SmolLM2-135M on a CPU unless given.
        words: A model and a cohort of the grid (``TinyLlama-1.1B``, ``clients64``), and ``qv`` or ``all``.
    """
    case = case_of(words, Case() if tokens is None else replace(Case(), tokens=tokens))
    depth = layers or (case.shapes.layers if torch.cuda.is_available() else min(CPU_LAYERS, case.shapes.layers))
    # A graph that is replayed is one operation to the profiler.
    step, whole = Step(case, depth, cuda_graphs=False), not (layers or tokens or words)
    name = f"explain_{case.id}" if not whole else "explain"
    question = f"Where the time and memory of a step go: {case.model}, {depth} layers, {len(case.ranks)} clients"
    command = " ".join(["flora bench --explain", *words])
    folder = machine_folder(RESULTS if whole else SMOKE)
    result = Result(name, question, {**case.settings, "layers": depth}, folder, command)
    # On both sides of the step: a machine that slows down meanwhile would make limits of its bad moments.
    before, found, after = rates(step.device), measure(step), rates(step.device, turn=1)
    rate = {key: max(before[key], after[key]) for key in before}
    shown, text = tables(step, found, rate)
    result.save(**found, limits=limits(step, rate), rates=rate, text=text, finished=True)
    return shown, text


def case_of(words: Sequence[str], case: Case) -> Case:
    """A case changed by the names of models, cohorts and targets.

    Raises:
        ValueError: For a word that is none of them.
    """
    from bench.cases.grid import MIXES, MODELS

    for word in words:
        found = [axis for axis, known in (("model", MODELS), ("mix", MIXES), ("targets", TARGETS)) if word in known]
        if not found:
            names = ", ".join([*MODELS, *MIXES, *TARGETS])
            raise ValueError(f"--explain knows models, cohorts and targets ({names}), got {word!r}")
        case = replace(case, **{found[0]: word})
    return case


def tables(step: Step, found: dict[str, Any], rate: dict[str, float]) -> tuple[list[Any], str]:
    """The tables and the sentence."""
    limit, whole = limits(step, rate), found["seconds"]
    rows = [
        [
            part,
            f"{1e3 * share * whole:.1f}",
            f"{share:.1%}",
            f"{1e3 * limit[part]:.1f}",
            f"{1e3 * (share * whole - limit[part]):.1f}",
        ]
        for part, share in sorted(found["shares"].items(), key=lambda item: -item[1])
    ]
    rows.append(["whole step", f"{1e3 * whole:.1f}", "100.0%", f"{1e3 * sum(limit.values()):.1f}", ""])
    memory = [["base weights", found["weights_bytes"]], ["adapters", found["adapter_bytes"]]]
    memory += [["gradients and moments", found["optimizer_bytes"]]]
    kept = sorted(found["saved_bytes"].items(), key=lambda item: -item[1])
    memory += [[f"kept for backward: {part}", size] for part, size in kept if size >= 1e5]
    case, per_token = step.case, sum(found["saved_bytes"].values()) / step.tokens
    title = f"{case.model}, {step.layers} layers, {len(case.ranks)} clients ({case.mix}), {case.tokens} tokens each"
    part, gap = largest_gap(found, limit)
    frozen = limit["base products"] + limit["attention"] + limit["loss"] + limit["norm"] + limit["elementwise"]
    how = ", without CUDA graphs," if step.device.type == "cuda" else ""
    text = (
        f"A step{how} takes {1e3 * whole:.0f} ms: {whole / found['frozen_seconds']:.2f} times the frozen base "
        f"(forward, loss and dX, {1e3 * found['frozen_seconds']:.0f} ms in turns with it) and {whole / frozen:.2f} "
        f"times what the frozen base would take at the measured {rate['matrix_flops_per_s'] / 1e9:.0f} GFLOP/s and "
        f"{rate['copy_bytes_per_s'] / 1e9:.1f} GB/s. A part's limit is its operations or bytes at these rates; what "
        f"ought to be free has none. The largest gap to a limit is {part}: {1e3 * gap:.0f} ms."
    )
    shown = [[name, f"{size / 1e6:.1f}"] for name, size in memory]
    return [
        (f"Time of a step: {title}", ["part", "ms", "share", "limit, ms", "gap, ms"], rows),
        (f"Memory of a step ({per_token / 1e3:.0f} kB kept a token)", ["what", "MB"], shown),
    ], text


__all__ = ["PARTS", "case_of", "explain", "largest_gap", "limits", "measure", "seconds_of_parts", "tables"]
