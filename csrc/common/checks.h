// Checks of arguments, one wording for all functions: name, expected, got. Every check gives FLORA_OK or fails.
#pragma once

#include <stdint.h>

#include "backend.h"

// Give the status of the first check that fails back to the caller.
namespace flora {

// For printf's %lld.
constexpr long long wide(int64_t value) { return value; }

constexpr uint32_t code(int32_t dtype) { return 1u << dtype; }
constexpr uint32_t FLOATS = code(FLORA_FP32) | code(FLORA_BF16) | code(FLORA_FP16) | code(FLORA_FP64);
constexpr uint32_t WIDE_FLOATS = code(FLORA_FP32) | code(FLORA_FP64);

// The bytes that a matrix or vector covers: [low, high); empty if there are no elements.
struct Span {
    uintptr_t low, high;
    // Bytes from row to row where columns are contiguous, and of a row; 0 where they are not.
    int64_t row_bytes, width_bytes;
};

// A name such as "items[3].A", without memory of its own.
struct Name {
    Name(const char *field, int64_t index = -1) : field(field), index(index) {}
    const char *c_str();

    const char *field;
    int64_t index;
    char text[64];
};

flora_status check_struct(const char *name, const void *given, size_t known);
flora_status check_exec(const flora_exec *exec);
flora_status check_workspace(const flora_exec &exec, size_t need);

// dtype, sizes, alignment, overflow, and, for an output, that no two elements share a place. A size of -1 is any.
flora_status check_matrix(Name name, const flora_matrix &matrix, uint32_t dtypes, int64_t rows, int64_t columns,
                          bool output, Span *span);
flora_status check_vector(Name name, const flora_vector &vector, uint32_t dtypes, int64_t size, bool output,
                          Span *span);
flora_status check_array(Name name, const void *data, int64_t count, size_t element, Span *span);

// Offsets that start at 0, never fall and end at `total`.
template <class I>
flora_status check_offsets(Name name, const I *offsets, int64_t count, int64_t total) {
    if (offsets[0] != 0)
        return fail(FLORA_BAD_ARGUMENT, "%s must start at 0, got %lld", name.c_str(), wide(offsets[0]));
    for (int64_t i = 0; i < count; ++i)
        if (offsets[i + 1] < offsets[i])
            return fail(FLORA_BAD_ARGUMENT, "%s must never fall, got %lld then %lld at %lld", name.c_str(),
                        wide(offsets[i]), wide(offsets[i + 1]), wide(i));
    if (offsets[count] != total)
        return fail(FLORA_BAD_ARGUMENT, "%s must end at %lld, the length of its axis, got %lld", name.c_str(),
                    wide(total), wide(offsets[count]));
    return FLORA_OK;
}

// An output and another argument must have no element's byte in common.
flora_status check_apart(Name output, const Span &a, Name other, const Span &b);

inline Span workspace_span(const flora_exec &exec) {
    uintptr_t base = reinterpret_cast<uintptr_t>(exec.workspace);
    return {base, base + exec.workspace_bytes, 0, 0};
}

// All of an operation's arguments; the struct itself is known to be sound.
flora_status check_merge(const flora_merge_item *items, int64_t count, const flora_merge_options *options);
flora_status check_merge_overlaps(const MergeItems &items, const flora_merge_options &options);
flora_status check_merge_workspace(const flora_exec &exec, const MergeItems &items,
                                   const flora_merge_options &options);
flora_status check_shrink(const flora_exec &exec, const flora_shrink_args &args);
flora_status check_expand(const flora_exec &exec, const flora_expand_args &args);
flora_status check_wgrad(const flora_exec &exec, const flora_wgrad_args &args);
flora_status check_adamw(const flora_exec &exec, const flora_adamw_args &args);

// The text behind flora_last_error(); what the CPU has.
const char *last_message();
int32_t best_isa();
int32_t default_threads();

}  // namespace flora
