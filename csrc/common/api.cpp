// The C interface: check every argument, ask the device how much workspace it needs, call it.
#include "checks.h"

#ifndef FLORA_NO_CUDA
#define FLORA_NO_CUDA "the reason is unknown"
#endif
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

// The fields of a sound exec that this version knows; for a query without the workspace, which is not looked at.
static flora_exec known_part(const flora_exec &exec, bool query) {
    flora_exec known = exec;
    known.struct_size = sizeof(flora_exec);
    if (query) known.workspace = nullptr, known.workspace_bytes = 0;
    return known;
}

// A workspace's bytes as callers see them: aligned_alloc takes multiples only.
static flora_status in_whole_units(flora_status status, size_t *bytes) {
    constexpr size_t UNIT = FLORA_WORKSPACE_ALIGNMENT;
    if (status == FLORA_OK) *bytes = (*bytes + UNIT - 1) / UNIT * UNIT;
    return status;
}

// An operation on structs as the caller gave them: the workspace that it needs into *bytes, or itself.
template <class Args>
static flora_status operate(const flora_exec *given, const Args *args, bool query, size_t *bytes,
                            flora_status (*check)(const flora_exec &, const Args &),
                            flora_status (*Backend::*ask)(const flora_exec &, const Args &, size_t *),
                            flora_status (*Backend::*run)(const flora_exec &, const Args &)) {
    FLORA_TRY(check_exec(given));
    FLORA_TRY(check_struct("args", args, sizeof(Args)));
    flora_exec exec = known_part(*given, query);
    const Backend *backend = backend_of(exec.device);
    FLORA_TRY(check(exec, *args));
    size_t need = 0;
    if (query && !bytes) return fail(FLORA_BAD_ARGUMENT, "bytes must not be NULL");
    if (!query) bytes = &need;
    FLORA_TRY(in_whole_units((backend->*ask)(exec, *args, bytes), bytes));
    if (query) return FLORA_OK;
    FLORA_TRY(check_workspace(exec, need));
    return (backend->*run)(exec, *args);
}

#define FLORA_OPERATION(NAME)                                                                                       \
    flora_status flora_##NAME##_workspace(const flora_exec *exec, const flora_##NAME##_args *args, size_t *bytes) { \
        return operate(exec, args, true, bytes, check_##NAME, &Backend::NAME##_workspace, &Backend::NAME);          \
    }                                                                                                               \
    flora_status flora_##NAME(const flora_exec *exec, const flora_##NAME##_args *args) {                            \
        return operate(exec, args, false, nullptr, check_##NAME, &Backend::NAME##_workspace, &Backend::NAME);       \
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
        return fail(FLORA_NO_DEVICE, "this library was built without CUDA (" FLORA_NO_CUDA ")");
    return fail(FLORA_BAD_ARGUMENT, "device must be FLORA_CPU or FLORA_CUDA, got %d", device);
}

int32_t flora_cpu_isa(void) { return best_isa(); }

int32_t flora_cpu_threads(void) { return default_threads(); }

flora_status flora_merge_many_workspace(const flora_exec *given, const flora_merge_item *items, int64_t num_items,
                                        const flora_merge_options *options, size_t *bytes) {
    FLORA_TRY(check_exec(given));
    FLORA_TRY(check_merge(items, num_items, options));
    if (!bytes) return fail(FLORA_BAD_ARGUMENT, "bytes must not be NULL");
    *bytes = 0;
    if (!num_items) return FLORA_OK;
    flora_exec exec = known_part(*given, true);
    FLORA_TRY(check_merge_overlaps({items, num_items}, *options));
    return in_whole_units(backend_of(exec.device)->merge_workspace(exec, {items, num_items}, *options, bytes), bytes);
}

flora_status flora_merge_many(const flora_exec *given, const flora_merge_item *items, int64_t num_items,
                              const flora_merge_options *options) {
    size_t bytes;
    FLORA_TRY(flora_merge_many_workspace(given, items, num_items, options, &bytes));
    if (!num_items) return FLORA_OK;
    flora_exec exec = known_part(*given, false);
    FLORA_TRY(check_workspace(exec, bytes));
    FLORA_TRY(check_merge_workspace(exec, {items, num_items}, *options));
    return backend_of(exec.device)->merge(exec, {items, num_items}, *options);
}

flora_status flora_merge(const flora_exec *exec, const flora_merge_item *item, const flora_merge_options *options) {
    return flora_merge_many(exec, item, 1, options);
}

FLORA_OPERATION(shrink)
FLORA_OPERATION(expand)
FLORA_OPERATION(wgrad)
FLORA_OPERATION(adamw)

}  // extern "C"
