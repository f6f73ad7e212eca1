// The C interface: check every argument, ask the device how much workspace it needs, call it.
#include "checks.h"

#ifndef FLORA_VERSION
#define FLORA_VERSION "unknown"
#endif

using namespace flora;

static const Backend *backend_of(int32_t device) {
#ifdef FLORA_WITH_CUDA
    if (device == FLORA_CUDA) return &cuda_backend;
#endif
    return device == FLORA_CPU ? &cpu_backend : nullptr;
}

// Check an operation's arguments and tell its workspace; `exec` and `args` are as the caller gave them.
template <class Args>
static flora_status prepare(const flora_exec *exec, const Args *args, size_t *bytes,
                            flora_status (*check)(const flora_exec &, const Args &),
                            flora_status (*Backend::*ask)(const flora_exec &, const Args &, size_t *)) {
    FLORA_TRY(check_exec(exec));
    FLORA_TRY(check_struct("args", args, sizeof(Args)));
    FLORA_TRY(check(*exec, *args));
    if (!bytes) return fail(FLORA_BAD_ARGUMENT, "bytes must not be NULL");
    return (backend_of(exec->device)->*ask)(*exec, *args, bytes);
}

#define FLORA_OPERATION(NAME)                                                                                        \
    flora_status flora_##NAME##_workspace(const flora_exec *exec, const flora_##NAME##_args *args, size_t *bytes) {  \
        if (!exec) return check_exec(exec);                                                                          \
        flora_exec without = *exec;                                                                                  \
        without.workspace_bytes = 0;                                                                                 \
        return prepare(&without, args, bytes, check_##NAME, &Backend::NAME##_workspace);                             \
    }                                                                                                                \
    flora_status flora_##NAME(const flora_exec *exec, const flora_##NAME##_args *args) {                             \
        size_t bytes = 0;                                                                                            \
        FLORA_TRY(prepare(exec, args, &bytes, check_##NAME, &Backend::NAME##_workspace));                            \
        FLORA_TRY(check_workspace(*exec, bytes));                                                                    \
        return backend_of(exec->device)->NAME(*exec, *args);                                                         \
    }

extern "C" {

const char *flora_version(void) { return FLORA_VERSION; }

int32_t flora_abi_version(void) { return FLORA_ABI_MAJOR * 1000 + FLORA_ABI_MINOR; }

const char *flora_last_error(void) { return last_message(); }

const char *flora_status_name(flora_status status) {
    static const char *const names[] = {"FLORA_OK",          "FLORA_BAD_ARGUMENT", "FLORA_OVERLAP",
                                        "FLORA_BAD_WORKSPACE", "FLORA_UNSUPPORTED",  "FLORA_NO_DEVICE",
                                        "FLORA_DEVICE_ERROR"};
    return status >= FLORA_OK && status <= FLORA_DEVICE_ERROR ? names[status] : "an unknown status";
}

flora_status flora_device_available(int32_t device, int32_t device_index) {
    const Backend *backend = backend_of(device);
    if (backend) return backend->available(device_index);
    if (device == FLORA_CUDA)
        return fail(FLORA_NO_DEVICE, "this library was built without CUDA (nvcc was not found, or FLORA_CUDA=0)");
    return fail(FLORA_BAD_ARGUMENT, "device must be FLORA_CPU or FLORA_CUDA, got %d", device);
}

int32_t flora_cpu_isa(void) { return best_isa(); }

int32_t flora_cpu_threads(void) { return default_threads(); }

flora_status flora_merge_many_workspace(const flora_exec *exec, const flora_merge_item *items, int64_t num_items,
                                        const flora_merge_options *options, size_t *bytes) {
    FLORA_TRY(check_exec(exec));
    FLORA_TRY(check_merge(items, num_items, options));
    if (!bytes) return fail(FLORA_BAD_ARGUMENT, "bytes must not be NULL");
    *bytes = 0;
    return num_items ? backend_of(exec->device)->merge_workspace(*exec, {items, num_items}, *options, bytes) : FLORA_OK;
}

flora_status flora_merge_many(const flora_exec *exec, const flora_merge_item *items, int64_t num_items,
                              const flora_merge_options *options) {
    size_t bytes;
    FLORA_TRY(flora_merge_many_workspace(exec, items, num_items, options, &bytes));
    if (!num_items) return FLORA_OK;
    FLORA_TRY(check_workspace(*exec, bytes));
    FLORA_TRY(check_merge_overlaps(*exec, {items, num_items}, *options));
    return backend_of(exec->device)->merge(*exec, {items, num_items}, *options);
}

flora_status flora_merge(const flora_exec *exec, const flora_merge_item *item, const flora_merge_options *options) {
    return flora_merge_many(exec, item, 1, options);
}

FLORA_OPERATION(shrink)
FLORA_OPERATION(expand)
FLORA_OPERATION(wgrad)
FLORA_OPERATION(adamw)

}  // extern "C"
