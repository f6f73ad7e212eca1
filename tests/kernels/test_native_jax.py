"""The XLA handlers from JAX on the CPU: odd shapes, dtypes, layouts, vmap, and errors that name the argument.

Letters: M packed tokens, K in_features, N out_features, P sum of ranks.
"""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.slow
pytest.importorskip("flora_kernels.native", exc_type=ImportError)
jax = pytest.importorskip("jax")
jnp = jax.numpy
M, K, N, P = 7, 13, 5, 3
# A client without tokens stands between two others.
TOKENS, RANKS, SCALES = (0, 3, 3, M), (0, 2, 2, P), (2.0, 1.0, 0.5)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> Any:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    from flora_kernels import jax_ffi

    made = jax_ffi.build(tmp_path_factory.mktemp("handlers") / "made" / "anew")
    assert jax_ffi.build(made.parent) == made
    return jax_ffi


def arrays(dtype: Any = None) -> list[Any]:
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal(s), dtype) for s in ((M, K), (N, K), (P, K), (P, N))]


def plain(x: Any, W: Any, A: Any, B: Any) -> Any:
    parts = [SCALES[c] * (x[TOKENS[c] : TOKENS[c + 1]] @ A[RANKS[c] : RANKS[c + 1]].T) for c in range(3)]
    return x @ W.T + jnp.concatenate([part @ B[RANKS[c] : RANKS[c + 1]] for c, part in enumerate(parts)])


def near(out: Any, wanted: Any) -> bool:
    """Both are sums of floats in some order: a few units of the largest."""
    bound = 8 * jnp.finfo(wanted.dtype).eps * jnp.abs(wanted).max()
    return out.shape == wanted.shape and bool(jnp.abs(out - wanted).max() <= bound)


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_for_a_random_upstream_gradient(layout, kernels):
    x, W, A, B = arrays()
    if layout == "columns":
        x, A = (jnp.asarray(np.asfortranarray(array)) for array in (x, A))
    dy = jax.random.normal(jax.random.key(0), (M, N))
    ours, pull = jax.vjp(
        jax.jit(lambda *three: kernels.lora_linear(three[0], W, *three[1:], TOKENS, RANKS, SCALES)), x, A, B
    )
    right, pull_right = jax.vjp(lambda *three: plain(three[0], W, *three[1:]), x, A, B)
    assert near(ours, right)
    assert all(map(near, pull(dy), pull_right(dy)))


def test_narrow_activations_with_float32_masters(kernels):
    x, W, A, B = arrays()
    x, W = x.astype(jnp.bfloat16), W.astype(jnp.bfloat16)
    loss = lambda *four: kernels.lora_linear(*four, TOKENS, RANKS, SCALES).astype(jnp.float32).sum()  # noqa: E731
    gradients = jax.jit(jax.grad(loss, argnums=(0, 2, 3)))(x, W, A, B)
    assert [str(one.dtype) for one in gradients] == ["bfloat16", "float32", "float32"]


def test_vmap_is_one_call_after_another(kernels):
    x, W, A, B = arrays()
    both = jnp.stack([x, -x])
    out = jax.vmap(lambda one: kernels.lora_linear(one, W, A, B, TOKENS, RANKS, SCALES))(both)
    assert near(out, jnp.stack([plain(x, W, A, B), plain(-x, W, A, B)]))
    loss = lambda A: (kernels.lora_linear(x, W, A, B, TOKENS, RANKS, SCALES) ** 2).sum()  # noqa: E731
    right = lambda A: (plain(x, W, A, B) ** 2).sum()  # noqa: E731
    assert near(jax.vmap(jax.grad(loss))(jnp.stack([A, -A])), jax.vmap(jax.grad(right))(jnp.stack([A, -A])))


def test_no_tokens_and_no_ranks(kernels):
    x, W, A, B = arrays()
    assert kernels.lora_linear(x[:0], W, A, B, (0, 0), (0, P), (1.0,)).shape == (0, N)
    assert near(kernels.lora_linear(x, W, A[:0], B[:0], (0, M), (0, 0), (1.0,)), x @ W.T)


def test_a_weight_that_is_kept_is_not_changed(kernels):
    _, W, A, B = arrays()
    before = np.array(W)
    assert near(jax.jit(kernels.merge)(W, A, B, jnp.ones(P)), W + B.T @ A)
    assert np.array_equal(W, before)


TABLES = dict(tokens=TOKENS, ranks=RANKS, scaling_C=SCALES)
WRONG = [
    (dict(x_MK=jnp.zeros((1, M, K))), "x_MK must have 2 axes, got 3; reshape it"),
    (dict(x_MK=[[1.0]]), "x_MK must be an array of JAX or NumPy, got list"),
    (dict(x_MK=jnp.zeros((M, K), int)), "x_MK must be float32 or .*, got int32; convert it"),
    (dict(weight_NK=jnp.zeros((N, K), jnp.bfloat16)), "weight_NK must be float32, got bfloat16; convert it"),
    (dict(weight_NK=jnp.zeros((N, 9))), r"weight_NK must have K=13 columns, as x_MK has, got \(5, 9\)"),
    (dict(A_PK=jnp.zeros((P, K), jnp.int8)), "A_PK must be float32, got int8; convert it"),
    (dict(A_PK=jnp.zeros((P, 9))), r"A must have the shape \(any, 13\) to fit the others, got \(3, 9\)"),
    (dict(B_PN=jnp.zeros((N, P))), r"B must have the shape .* got \(5, 3\)"),
    (dict(tokens=(0, 3, 3, 6)), "clients.token_offsets must end at 7, the length of its axis, got 6"),
    (dict(tokens=(0, 3, 2, 7)), r"tokens must be offsets that start at 0 and never fall, got \(0, 3, 2, 7\)"),
    (dict(tokens=()), r"tokens must be offsets that start at 0 and never fall, got \(\)"),
    (dict(tokens=(0, 2.5)), r"tokens must be integers known when tracing, got \(0, 2.5\)"),
    # The handlers read as many scales as there are clients: fewer would be memory that is not theirs.
    (
        dict(scaling_C=(2.0,)),
        "ranks must have 4 offsets and scaling_C 3 numbers for the 3 clients of tokens, got 4 and 1",
    ),
    (dict(ranks=(0, P)), "ranks must have 4 offsets .* got 2 and 3"),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[words[:30] for _, words in WRONG])
def test_what_does_not_fit_is_named(change, words, kernels):
    names = "x_MK", "weight_NK", "A_PK", "B_PN"
    with pytest.raises((TypeError, ValueError, jax.errors.JaxRuntimeError), match=words):
        kernels.lora_linear(**{**dict(zip(names, arrays(), strict=True)), **TABLES, **change})


def test_scales_that_are_traced_are_refused(kernels):
    four = arrays()
    with pytest.raises(TypeError, match="scaling_C must be numbers known when tracing, got JitTracer"):
        jax.jit(lambda scales: kernels.lora_linear(*four, TOKENS, RANKS, scales))(jnp.ones(3))


def test_the_handlers_check_their_tables_themselves(kernels):
    """Whoever calls them without ``lora_linear`` is refused too."""
    x, _, A, _ = arrays()
    tables = dict(tokens=np.array(TOKENS, np.int32), ranks=np.array(RANKS, np.int32), scaling=np.array([2.0]))
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"tokens and ranks must have one entry more than .* clients"):
        jax.ffi.ffi_call("flora_shrink", jax.ShapeDtypeStruct((14,), x.dtype))(x, A, **tables)


def test_merges_that_do_not_fit_are_named(kernels):
    _, W, A, B = arrays()
    for coef, words in (
        (jnp.ones(4), "coef must have 3 elements to fit the others, got 4"),
        (jnp.ones((3, 1)), "coef_P must have 1 axes, got 2; reshape it"),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match=words):
            kernels.merge(W, A, B, coef)
    with pytest.raises(ValueError, match="accumulate must be float32 or float64, got 'float16'"):
        kernels.merge(W, A, B, jnp.ones(P), accumulate="float16")


def test_no_compiler_is_said(monkeypatch, tmp_path):
    from flora_kernels import jax_ffi

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"C\+\+ compiler, got 'no-such-compiler'; install g\+\+ or set CXX"):
        jax_ffi.build(tmp_path)
