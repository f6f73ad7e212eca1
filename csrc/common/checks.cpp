#include "checks.h"

#include <stdarg.h>
#include <stdio.h>

namespace flora {

static thread_local char last_error[512] = "no call of this thread has failed";

flora_status fail(flora_status status, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(last_error, sizeof(last_error), format, arguments);
    va_end(arguments);
    return status;
}

const char *last_message() { return last_error; }

size_t element_bytes(int32_t dtype) {
    static const size_t bytes[] = {0, 4, 2, 2, 8, 2};
    return dtype >= FLORA_FP32 && dtype <= FLORA_INT16 ? bytes[dtype] : 0;
}

const char *dtype_name(int32_t dtype) {
    static const char *const names[] = {"", "fp32", "bf16", "fp16", "fp64", "int16"};
    return element_bytes(dtype) ? names[dtype] : "an unknown code";
}

const char *Name::c_str() {
    if (index < 0) return field;
    snprintf(text, sizeof(text), "items[%lld].%s", wide(index), field);
    return text;
}

flora_status check_struct(const char *name, const void *given, size_t known) {
    if (!given) return fail(FLORA_BAD_ARGUMENT, "%s must not be NULL", name);
    if (reinterpret_cast<uintptr_t>(given) % alignof(int64_t))
        return fail(FLORA_BAD_ARGUMENT, "%s must be aligned to %zu bytes, got %p", name, alignof(int64_t), given);
    size_t size = *static_cast<const size_t *>(given);
    // The structs of this version are the smallest there are; a longer one is of a later version.
    if (size < known || size > known + 4096 || size % alignof(int64_t))
        return fail(FLORA_BAD_ARGUMENT, "%s.struct_size must be %zu (use the _INIT macro), got %zu", name, known, size);
    for (size_t i = known; i < size; ++i)
        if (static_cast<const char *>(given)[i])
            return fail(FLORA_UNSUPPORTED, "%s sets fields that this version (%d.%d) does not know", name,
                        FLORA_ABI_MAJOR, FLORA_ABI_MINOR);
    return FLORA_OK;
}

flora_status check_exec(const flora_exec *exec) {
    FLORA_TRY(check_struct("exec", exec, sizeof(flora_exec)));
    if (exec->device != FLORA_CPU && exec->device != FLORA_CUDA)
        return fail(FLORA_BAD_ARGUMENT, "exec.device must be FLORA_CPU or FLORA_CUDA, got %d", exec->device);
    if (exec->device_index < 0 || (exec->device == FLORA_CPU && exec->device_index))
        return fail(FLORA_BAD_ARGUMENT, "exec.device_index must be 0 on the CPU and never negative, got %d",
                    exec->device_index);
    if (exec->num_threads < 0 || exec->num_threads > 4096)
        return fail(FLORA_BAD_ARGUMENT, "exec.num_threads must be between 0 and 4096, got %d", exec->num_threads);
    if (exec->isa < FLORA_ISA_AUTO || exec->isa > FLORA_ISA_AVX512)
        return fail(FLORA_BAD_ARGUMENT, "exec.isa must be one of FLORA_ISA_*, got %d", exec->isa);
    return flora_device_available(exec->device, exec->device_index);
}

flora_status check_workspace(const flora_exec &exec, size_t need) {
    if (!need) return FLORA_OK;
    if (!exec.workspace) return fail(FLORA_BAD_WORKSPACE, "exec.workspace must have %zu bytes, got NULL", need);
    if (reinterpret_cast<uintptr_t>(exec.workspace) % FLORA_WORKSPACE_ALIGNMENT)
        return fail(FLORA_BAD_WORKSPACE, "exec.workspace must be aligned to %d bytes, got %p",
                    FLORA_WORKSPACE_ALIGNMENT, exec.workspace);
    if (exec.workspace_bytes < need)
        return fail(FLORA_BAD_WORKSPACE, "exec.workspace_bytes must be at least %zu, got %zu", need,
                    exec.workspace_bytes);
    return FLORA_OK;
}

static flora_status check_dtype(Name name, int32_t dtype, uint32_t dtypes) {
    if (element_bytes(dtype) && (dtypes & code(dtype))) return FLORA_OK;
    char wanted[64] = "";
    int used = 0;
    for (int32_t known = FLORA_FP32; known <= FLORA_INT16; ++known)
        if (dtypes & code(known))
            used += snprintf(wanted + used, sizeof(wanted) - static_cast<size_t>(used), "%s%s", used ? ", " : "",
                             dtype_name(known));
    return fail(FLORA_BAD_ARGUMENT, "%s.dtype must be %s, got %s (%d); convert it", name.c_str(), wanted,
                dtype_name(dtype), dtype);
}

static flora_status check_data(Name name, const void *data, bool empty, size_t alignment) {
    if (!data && !empty) return fail(FLORA_BAD_ARGUMENT, "%s.data must not be NULL", name.c_str());
    if (reinterpret_cast<uintptr_t>(data) % alignment)
        return fail(FLORA_BAD_ARGUMENT, "%s.data must be aligned to its element of %zu bytes, got %p; copy it",
                    name.c_str(), alignment, data);
    return FLORA_OK;
}

// Widen [low, high] (bytes from data) by an axis; true if that overflows.
static bool widen(int64_t size, int64_t stride, int64_t element, int64_t *low, int64_t *high) {
    int64_t reach;
    if (__builtin_mul_overflow(size - 1, stride, &reach) || __builtin_mul_overflow(reach, element, &reach)) return true;
    return __builtin_add_overflow(*(reach < 0 ? low : high), reach, reach < 0 ? low : high);
}

static flora_status make_span(Name name, const void *data, int64_t rows, int64_t row_stride, int64_t columns,
                              int64_t column_stride, int64_t element, Span *span) {
    *span = {0, 0, 0, 0};
    if (!rows || !columns) return FLORA_OK;
    int64_t low = 0, high = element, count;
    uintptr_t base = reinterpret_cast<uintptr_t>(data);
    bool over = __builtin_mul_overflow(rows, columns, &count) || __builtin_mul_overflow(count, element, &count) ||
                widen(rows, row_stride, element, &low, &high) || widen(columns, column_stride, element, &low, &high);
    if (over || static_cast<uintptr_t>(-low) > base || static_cast<uintptr_t>(high) > UINTPTR_MAX - base)
        return fail(FLORA_BAD_ARGUMENT, "%s reaches beyond memory: shape (%lld, %lld) with strides %lld and %lld",
                    name.c_str(), wide(rows), wide(columns), wide(row_stride), wide(column_stride));
    *span = {base + static_cast<uintptr_t>(low), base + static_cast<uintptr_t>(high), 0, 0};
    if (column_stride == 1 && row_stride > 0 && rows > 1)
        span->row_bytes = row_stride * element, span->width_bytes = columns * element;
    return FLORA_OK;
}

static bool shares_places(int64_t rows, int64_t row_stride, int64_t columns, int64_t column_stride) {
    // The stride of an axis of one element means nothing, and may be anything.
    if (rows <= 1) return columns > 1 && column_stride == 0;
    if (columns <= 1) return row_stride == 0;
    int64_t a = row_stride < 0 ? -row_stride : row_stride, b = column_stride < 0 ? -column_stride : column_stride;
    // The axis of smaller steps must fit into one step of the other.
    return a < b ? (a == 0 || (rows - 1) * a >= b) : (b == 0 || (columns - 1) * b >= a);
}

static flora_status check_sizes(Name name, int64_t rows, int64_t columns, int64_t want_rows, int64_t want_columns) {
    if (rows < 0 || columns < 0)
        return fail(FLORA_BAD_ARGUMENT, "%s must have no negative size, got (%lld, %lld)", name.c_str(), wide(rows),
                    wide(columns));
    auto fits = [&](int64_t r, int64_t c) {
        return (want_rows < 0 || r == want_rows) && (want_columns < 0 || c == want_columns);
    };
    if (fits(rows, columns)) return FLORA_OK;
    char want[2][24] = {"any", "any"};
    if (want_rows >= 0) snprintf(want[0], sizeof(want[0]), "%lld", wide(want_rows));
    if (want_columns >= 0) snprintf(want[1], sizeof(want[1]), "%lld", wide(want_columns));
    return fail(FLORA_BAD_ARGUMENT, "%s must have the shape (%s, %s) to fit the others, got (%lld, %lld)%s",
                name.c_str(), want[0], want[1], wide(rows), wide(columns),
                fits(columns, rows) ? "; pass its transpose" : "");
}

flora_status check_matrix(Name name, const flora_matrix &m, uint32_t dtypes, int64_t rows, int64_t columns, bool output,
                          Span *span) {
    FLORA_TRY(check_dtype(name, m.dtype, dtypes));
    if (m.reserved) return fail(FLORA_BAD_ARGUMENT, "%s.reserved must be 0, got %d", name.c_str(), m.reserved);
    FLORA_TRY(check_sizes(name, m.rows, m.columns, rows, columns));
    size_t element = element_bytes(m.dtype);
    FLORA_TRY(check_data(name, m.data, !m.rows || !m.columns, element));
    FLORA_TRY(make_span(name, m.data, m.rows, m.row_stride, m.columns, m.column_stride, static_cast<int64_t>(element),
                        span));
    if (output && m.rows && m.columns && shares_places(m.rows, m.row_stride, m.columns, m.column_stride))
        return fail(FLORA_OVERLAP, "%s is written and must have a place for each element, got strides %lld and %lld; copy it",
                    name.c_str(), wide(m.row_stride), wide(m.column_stride));
    return FLORA_OK;
}

flora_status check_vector(Name name, const flora_vector &v, uint32_t dtypes, int64_t size, bool output, Span *span) {
    FLORA_TRY(check_dtype(name, v.dtype, dtypes));
    if (v.reserved) return fail(FLORA_BAD_ARGUMENT, "%s.reserved must be 0, got %d", name.c_str(), v.reserved);
    if (v.size < 0)
        return fail(FLORA_BAD_ARGUMENT, "%s must have no negative size, got %lld", name.c_str(), wide(v.size));
    if (size >= 0 && v.size != size)
        return fail(FLORA_BAD_ARGUMENT, "%s must have %lld elements to fit the others, got %lld", name.c_str(),
                    wide(size), wide(v.size));
    size_t element = element_bytes(v.dtype);
    FLORA_TRY(check_data(name, v.data, !v.size, element));
    FLORA_TRY(make_span(name, v.data, v.size ? 1 : 0, 0, v.size, v.stride, static_cast<int64_t>(element), span));
    if (output && v.size > 1 && v.stride == 0)
        return fail(FLORA_OVERLAP, "%s is written and must have a place for each element, got stride 0; copy it",
                    name.c_str());
    return FLORA_OK;
}

flora_status check_array(Name name, const void *data, int64_t count, size_t element, Span *span) {
    *span = {0, 0, 0, 0};
    if (count < 0)
        return fail(FLORA_BAD_ARGUMENT, "%s must have no negative size, got %lld", name.c_str(), wide(count));
    FLORA_TRY(check_data(name, data, !count, element));
    return make_span(name, data, count ? 1 : 0, 0, count, 1, static_cast<int64_t>(element), span);
}

flora_status check_apart(Name output, const Span &a, Name other, const Span &b) {
    if (a.low >= a.high || b.low >= b.high || a.low >= b.high || b.low >= a.high) return FLORA_OK;
    // Column ranges of one matrix lie within each other's bounds and have nothing in common.
    if (a.row_bytes && a.row_bytes == b.row_bytes) {
        int64_t ahead = static_cast<int64_t>(a.low < b.low ? b.low - a.low : a.low - b.low) % a.row_bytes;
        int64_t first = a.low < b.low ? a.width_bytes : b.width_bytes;
        int64_t then = a.low < b.low ? b.width_bytes : a.width_bytes;
        if (ahead >= first && ahead + then <= a.row_bytes) return FLORA_OK;
    }
    return fail(FLORA_OVERLAP, "%s is written and must share no memory with %s; copy one of them", output.c_str(),
                other.c_str());
}

}  // namespace flora
