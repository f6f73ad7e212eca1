// XLA FFI handlers over the C interface, for JAX on the CPU: buffers are used where they lie.
// Compiled by who uses it, against the headers of his jaxlib (jax.ffi.include_dir()); see docs/embedding.md.
#include <vector>

#include "flora_kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using Buffer = ffi::AnyBuffer;
using Output = ffi::Result<ffi::AnyBuffer>;
using Offsets = ffi::Span<const int32_t>;

namespace {

int32_t dtype_of(const Buffer &b) {
    switch (b.element_type()) {
        case ffi::F32: return FLORA_FP32;
        case ffi::BF16: return FLORA_BF16;
        case ffi::F16: return FLORA_FP16;
        case ffi::F64: return FLORA_FP64;
        case ffi::S16: return FLORA_INT16;
        default: return 0;  // which the library refuses by name, as jax_ffi does before it
    }
}

flora_matrix matrix(const Buffer &b) {
    auto sizes = b.dimensions();
    if (sizes.size() != 2) return {b.untyped_data(), -1, -1, 1, 1, dtype_of(b), 0};
    return {b.untyped_data(), sizes[0], sizes[1], sizes[1], 1, dtype_of(b), 0};
}

flora_vector vector(const Buffer &b) {
    auto sizes = b.dimensions();
    return {b.untyped_data(), sizes.size() == 1 ? sizes[0] : -1, 1, dtype_of(b), 0};
}

// Ask for the workspace, run. XLA's CPU client lends no scratch memory, so each of its threads keeps its own.
template <class Ask, class Run>
ffi::Error call(Ask ask, Run run) {
    static thread_local std::vector<char> kept;
    flora_exec exec = FLORA_EXEC_INIT;
    flora_status status = ask(&exec, &exec.workspace_bytes);
    if (kept.size() < exec.workspace_bytes + FLORA_WORKSPACE_ALIGNMENT)
        kept.resize(exec.workspace_bytes + FLORA_WORKSPACE_ALIGNMENT);
    uintptr_t past = reinterpret_cast<uintptr_t>(kept.data()) + FLORA_WORKSPACE_ALIGNMENT - 1;
    exec.workspace = reinterpret_cast<void *>(past / FLORA_WORKSPACE_ALIGNMENT * FLORA_WORKSPACE_ALIGNMENT);
    if (status == FLORA_OK) status = run(&exec);
    if (status == FLORA_OK) return ffi::Error::Success();
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, flora_last_error());
}

// An operation on clients. The library cannot know how long their tables are: as many entries as there are clients.
template <class Args>
ffi::Error call(flora_status (*ask)(const flora_exec *, const Args *, size_t *),
                flora_status (*run)(const flora_exec *, const Args *), const Args &args, Offsets tokens, Offsets ranks,
                ffi::Span<const double> scaling) {
    size_t offsets = tokens.size();
    if (!offsets || ranks.size() != offsets || (scaling.size() && scaling.size() + 1 != offsets))
        return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                          "tokens and ranks must have one entry more than there are clients, scaling as many or none");
    return call([&](auto *exec, size_t *bytes) { return ask(exec, &args, bytes); },
                [&](auto *exec) { return run(exec, &args); });
}

flora_clients clients_of(Offsets tokens, Offsets ranks, ffi::Span<const double> scaling) {
    flora_clients clients = {};
    clients.num_clients = static_cast<int64_t>(tokens.size()) - 1;
    clients.token_offsets = tokens.begin(), clients.rank_offsets = ranks.begin();
    if (scaling.size()) clients.scaling = scaling.begin(), clients.scaling_dtype = FLORA_FP64;
    return clients;
}

// W is donated: XLA hands in its buffer as the result, or a copy of it where the caller kept W.
void take_over(const Buffer &from, Output &to) {
    if (from.untyped_data() != to->untyped_data())
        __builtin_memcpy(to->untyped_data(), from.untyped_data(), from.size_bytes());
}

ffi::Error merge(Buffer W, Buffer A, Buffer B, Buffer coef, Output out, bool wide) {
    take_over(W, out);
    flora_merge_item item = FLORA_MERGE_ITEM_INIT;
    item.weight = matrix(*out), item.A = matrix(A), item.B = matrix(B), item.coef = vector(coef);
    flora_merge_options options = FLORA_MERGE_OPTIONS_INIT;
    options.accumulate = wide ? FLORA_FP64 : FLORA_FP32;
    return call(
        [&](auto *exec, size_t *bytes) { return flora_merge_many_workspace(exec, &item, 1, &options, bytes); },
        [&](auto *exec) { return flora_merge(exec, &item, &options); });
}

ffi::Error shrink(Buffer x, Buffer A, Output s, Offsets tokens, Offsets ranks,
                  ffi::Span<const double> scaling) {
    flora_shrink_args args = FLORA_SHRINK_ARGS_INIT;
    args.x = matrix(x), args.A = matrix(A), args.s = vector(*s), args.clients = clients_of(tokens, ranks, scaling);
    return call(flora_shrink_workspace, flora_shrink, args, tokens, ranks, scaling);
}

ffi::Error expand(Buffer y, Buffer s, Buffer B, Output out, Offsets tokens,
                  Offsets ranks, ffi::Span<const double> scaling) {
    take_over(y, out);
    flora_expand_args args = FLORA_EXPAND_ARGS_INIT;
    args.y = matrix(*out), args.s = vector(s), args.B = matrix(B), args.clients = clients_of(tokens, ranks, scaling);
    return call(flora_expand_workspace, flora_expand, args, tokens, ranks, scaling);
}

ffi::Error wgrad(Buffer ds, Buffer x, Buffer s, Buffer dy, Output dA, Output dB,
                 Offsets tokens, Offsets ranks, ffi::Span<const double> scaling) {
    flora_wgrad_args args = FLORA_WGRAD_ARGS_INIT;
    args.ds = vector(ds), args.x = matrix(x), args.s = vector(s), args.dy = matrix(dy);
    args.dA = matrix(*dA), args.dB = matrix(*dB), args.clients = clients_of(tokens, ranks, scaling);
    return call(flora_wgrad_workspace, flora_wgrad, args, tokens, ranks, scaling);
}

}  // namespace

#define FLORA_CLIENTS .Attr<Offsets>("tokens").Attr<Offsets>("ranks").Attr<ffi::Span<const double>>("scaling")

XLA_FFI_DEFINE_HANDLER_SYMBOL(flora_xla_merge, merge,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Ret<Buffer>().Attr<bool>("wide"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(flora_xla_shrink, shrink,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Ret<Buffer>()
                                  FLORA_CLIENTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(flora_xla_expand, expand,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Ret<Buffer>() FLORA_CLIENTS);
XLA_FFI_DEFINE_HANDLER_SYMBOL(flora_xla_wgrad, wgrad,
                              ffi::Ffi::Bind().Arg<Buffer>().Arg<Buffer>().Arg<Buffer>()
                                  .Arg<Buffer>().Ret<Buffer>().Ret<Buffer>() FLORA_CLIENTS);
