// What a device implements. csrc/common/api.cpp checks every argument once for all devices, then calls one of these:
// sizes fit each other, pointers are set and aligned, outputs overlap nothing, dtypes are ones the interface knows,
// and the workspace holds at least what the device's own *_workspace function told.
//
// A device still refuses (FLORA_UNSUPPORTED) what it has no kernel for, in *_workspace, which api.cpp always calls
// before the work itself; so whatever is refused has written nothing.
#pragma once

#include "flora_kernels.h"

#define FLORA_TRY(check)                                           \
    do {                                                           \
        flora_status flora_try_status = (check);                   \
        if (flora_try_status != FLORA_OK) return flora_try_status; \
    } while (0)

namespace flora {

// Items of a merge without their stride: item i of any struct_size.
struct MergeItems {
    const flora_merge_item *first;
    int64_t count;

    const flora_merge_item &operator[](int64_t i) const {
        return *reinterpret_cast<const flora_merge_item *>(reinterpret_cast<const char *>(first) +
                                                           static_cast<size_t>(i) * first->struct_size);
    }
};

struct Backend {
    flora_status (*available)(int32_t device_index);

    flora_status (*merge_workspace)(const flora_exec &, const MergeItems &, const flora_merge_options &, size_t *);
    flora_status (*merge)(const flora_exec &, const MergeItems &, const flora_merge_options &);

    flora_status (*shrink_workspace)(const flora_exec &, const flora_shrink_args &, size_t *);
    flora_status (*shrink)(const flora_exec &, const flora_shrink_args &);

    flora_status (*expand_workspace)(const flora_exec &, const flora_expand_args &, size_t *);
    flora_status (*expand)(const flora_exec &, const flora_expand_args &);

    flora_status (*wgrad_workspace)(const flora_exec &, const flora_wgrad_args &, size_t *);
    flora_status (*wgrad)(const flora_exec &, const flora_wgrad_args &);

    flora_status (*adamw_workspace)(const flora_exec &, const flora_adamw_args &, size_t *);
    flora_status (*adamw)(const flora_exec &, const flora_adamw_args &);
};

extern const Backend cpu_backend;  // csrc/cpu
#ifdef FLORA_WITH_CUDA
extern const Backend cuda_backend;  // csrc/cuda
#endif

// Keep the reason for flora_last_error() (printf's format, cut at 511 characters) and give the status back.
flora_status fail(flora_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));

// Bytes of an element, 0 for an unknown code; and its name in messages.
size_t element_bytes(int32_t dtype);
const char *dtype_name(int32_t dtype);

}  // namespace flora
