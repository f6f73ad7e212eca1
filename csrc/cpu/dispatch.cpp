// The CPU as a backend: each call goes to the best instruction set that the processor has, or to the one asked for.
#ifdef _OPENMP
#include <omp.h>
#endif

#include "checks.h"

namespace flora {

#ifdef FLORA_X86
namespace avx512 {
extern const Backend backend;
}
namespace avx2 {
extern const Backend backend;
}
#endif
namespace portable {
extern const Backend backend;
}

int32_t best_isa() {
#ifdef FLORA_X86
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return FLORA_ISA_AVX512;
    // Every processor with AVX2 and FMA has F16C.
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return FLORA_ISA_AVX2;
#endif
    return FLORA_ISA_PORTABLE;
}

int32_t default_threads() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}

static const Backend *kernels_of(int32_t isa) {
    static const int32_t best = best_isa();
#ifdef FLORA_X86
    int32_t chosen = isa == FLORA_ISA_AUTO ? best : isa;
    if (chosen <= best && chosen == FLORA_ISA_AVX512) return &avx512::backend;
    if (chosen <= best && chosen == FLORA_ISA_AVX2) return &avx2::backend;
#endif
    if (isa == FLORA_ISA_AUTO || isa == FLORA_ISA_PORTABLE) return &portable::backend;
    fail(FLORA_UNSUPPORTED, "exec.isa is %d, the best that this processor has is %d; use FLORA_ISA_AUTO", isa, best);
    return nullptr;
}

static flora_status available(int32_t) { return FLORA_OK; }

// A function of the chosen instruction set with the same arguments.
template <auto MEMBER, class... Arguments>
static flora_status forward(const flora_exec &exec, Arguments... arguments) {
    const Backend *kernels = kernels_of(exec.isa);
    return kernels ? (kernels->*MEMBER)(exec, arguments...) : FLORA_UNSUPPORTED;
}

template <auto MEMBER, class Args>
static flora_status call(const flora_exec &exec, const Args &args) {
    return forward<MEMBER, const Args &>(exec, args);
}

template <auto MEMBER, class Args>
static flora_status ask(const flora_exec &exec, const Args &args, size_t *bytes) {
    return forward<MEMBER, const Args &, size_t *>(exec, args, bytes);
}

static flora_status merge_workspace(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options,
                                    size_t *bytes) {
    return forward<&Backend::merge_workspace, const MergeItems &, const flora_merge_options &, size_t *>(exec, items,
                                                                                                        options, bytes);
}

static flora_status merge(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options) {
    return forward<&Backend::merge, const MergeItems &, const flora_merge_options &>(exec, items, options);
}

extern const Backend cpu_backend;
const Backend cpu_backend = {
    available,
    merge_workspace,
    merge,
    ask<&Backend::shrink_workspace, flora_shrink_args>,
    call<&Backend::shrink, flora_shrink_args>,
    ask<&Backend::expand_workspace, flora_expand_args>,
    call<&Backend::expand, flora_expand_args>,
    ask<&Backend::wgrad_workspace, flora_wgrad_args>,
    call<&Backend::wgrad, flora_wgrad_args>,
    ask<&Backend::adamw_workspace, flora_adamw_args>,
    call<&Backend::adamw, flora_adamw_args>,
};

}  // namespace flora
