// Checks of shrink, expand, wgrad and adamw.
#include "checks.h"

namespace flora {

namespace {

struct Named {
    const char *name;
    Span span;
};

// The first `outputs` of these are written: each shares nothing with any other, nor with the workspace.
flora_status check_all_apart(const flora_exec &exec, const Named *all, int count, int outputs) {
    for (int i = 0; i < count; ++i) {
        FLORA_TRY(check_apart({"exec.workspace"}, workspace_span(exec), {all[i].name}, all[i].span));
        for (int j = 0; j < outputs; ++j)
            if (i != j) FLORA_TRY(check_apart({all[j].name}, all[j].span, {all[i].name}, all[i].span));
    }
    return FLORA_OK;
}

flora_status check_dropout(const flora_clients &clients) {
    for (int64_t c = 0; c < clients.num_clients; ++c) {
        int32_t q = clients.q[c];
        if (q < 0 || q > 65536)
            return fail(FLORA_BAD_ARGUMENT, "clients.q[%lld] must be between 0 and 65536, got %d", wide(c), q);
        int64_t first = clients.first_row ? clients.first_row[c] : 0;
        int64_t rows = clients.token_offsets[c + 1] - clients.token_offsets[c];
        if (first < 0 || first > (1LL << 32) - rows)
            return fail(FLORA_BAD_ARGUMENT,
                        "clients.first_row[%lld] must be at least 0 and leave %lld rows below 2^32, got %lld",
                        wide(c), wide(rows), wide(first));
    }
    return FLORA_OK;
}

int64_t flat_size(const flora_clients &clients) {
    int64_t size = 0;
    for (int64_t c = 0; c < clients.num_clients; ++c)
        size += static_cast<int64_t>(clients.token_offsets[c + 1] - clients.token_offsets[c]) *
                (clients.rank_offsets[c + 1] - clients.rank_offsets[c]);
    return size;
}

// The tables, and on the CPU what they hold; `size` is the number of elements of S, -1 where they are not read.
flora_status check_clients(const flora_exec &exec, const flora_clients &clients, int64_t tokens, int64_t ranks,
                           int64_t *size) {
    Span span;
    int64_t count = clients.num_clients;
    if (count < 0 || count > INT32_MAX)
        return fail(FLORA_BAD_ARGUMENT, "clients.num_clients must be between 0 and 2^31 - 1, got %lld", wide(count));
    FLORA_TRY(check_array({"clients.token_offsets"}, clients.token_offsets, count + 1, 4, &span));
    FLORA_TRY(check_array({"clients.rank_offsets"}, clients.rank_offsets, count + 1, 4, &span));
    if (clients.max_rank < 0)
        return fail(FLORA_BAD_ARGUMENT, "clients.max_rank must not be negative, got %d", clients.max_rank);
    if (clients.scaling) {
        if (clients.scaling_dtype != FLORA_FP32 && clients.scaling_dtype != FLORA_FP64)
            return fail(FLORA_BAD_ARGUMENT, "clients.scaling_dtype must be fp32 or fp64, got %s (%d)",
                        dtype_name(clients.scaling_dtype), clients.scaling_dtype);
        size_t element = element_bytes(clients.scaling_dtype);
        FLORA_TRY(check_array({"clients.scaling"}, clients.scaling, count, element, &span));
    }
    if (clients.q) {
        FLORA_TRY(check_array({"clients.q"}, clients.q, count, 4, &span));
        FLORA_TRY(check_array({"clients.seed"}, clients.seed, count, 8, &span));
        if (clients.first_row) FLORA_TRY(check_array({"clients.first_row"}, clients.first_row, count, 8, &span));
    }
    *size = -1;
    if (exec.device != FLORA_CPU) return FLORA_OK;
    FLORA_TRY(check_offsets({"clients.token_offsets"}, clients.token_offsets, count, tokens));
    FLORA_TRY(check_offsets({"clients.rank_offsets"}, clients.rank_offsets, count, ranks));
    *size = flat_size(clients);
    return clients.q ? check_dropout(clients) : FLORA_OK;
}

flora_status check_contiguous(const char *name, const flora_vector &vector) {
    if (vector.stride == 1 || vector.size <= 1) return FLORA_OK;
    return fail(FLORA_BAD_ARGUMENT, "%s.stride must be 1, got %lld; copy it", name, wide(vector.stride));
}

// A factor in the dtype of the activations, or an fp32 master of 16-bit ones.
uint32_t factors_of(int32_t dtype) { return code(dtype) | (element_bytes(dtype) == 2 ? code(FLORA_FP32) : 0); }

}  // namespace

flora_status check_shrink(const flora_exec &exec, const flora_shrink_args &a) {
    Named all[3] = {{"s", {}}, {"x", {}}, {"A", {}}};
    int64_t size;
    FLORA_TRY(check_matrix({"x"}, a.x, FLOATS, -1, -1, false, &all[1].span));
    FLORA_TRY(check_matrix({"A"}, a.A, factors_of(a.x.dtype), -1, a.x.columns, false, &all[2].span));
    FLORA_TRY(check_clients(exec, a.clients, a.x.rows, a.A.rows, &size));
    FLORA_TRY(check_vector({"s"}, a.s, code(a.x.dtype), size, true, &all[0].span));
    FLORA_TRY(check_contiguous("s", a.s));
    return check_all_apart(exec, all, 3, 1);
}

flora_status check_expand(const flora_exec &exec, const flora_expand_args &a) {
    Named all[3] = {{"y", {}}, {"s", {}}, {"B", {}}};
    int64_t size;
    FLORA_TRY(check_matrix({"y"}, a.y, FLOATS, -1, -1, true, &all[0].span));
    FLORA_TRY(check_matrix({"B"}, a.B, factors_of(a.y.dtype), -1, a.y.columns, false, &all[2].span));
    FLORA_TRY(check_clients(exec, a.clients, a.y.rows, a.B.rows, &size));
    FLORA_TRY(check_vector({"s"}, a.s, code(a.y.dtype), size, false, &all[1].span));
    FLORA_TRY(check_contiguous("s", a.s));
    return check_all_apart(exec, all, 3, 1);
}

flora_status check_wgrad(const flora_exec &exec, const flora_wgrad_args &a) {
    Named all[6] = {{"dA", {}}, {"dB", {}}, {"ds", {}}, {"x", {}}, {"s", {}}, {"dy", {}}};
    int64_t size;
    FLORA_TRY(check_matrix({"x"}, a.x, FLOATS, -1, -1, false, &all[3].span));
    FLORA_TRY(check_matrix({"dy"}, a.dy, code(a.x.dtype), a.x.rows, -1, false, &all[5].span));
    FLORA_TRY(check_matrix({"dA"}, a.dA, factors_of(a.x.dtype), -1, a.x.columns, true, &all[0].span));
    FLORA_TRY(check_matrix({"dB"}, a.dB, code(a.dA.dtype), a.dA.rows, a.dy.columns, true, &all[1].span));
    FLORA_TRY(check_clients(exec, a.clients, a.x.rows, a.dA.rows, &size));
    FLORA_TRY(check_vector({"ds"}, a.ds, code(a.x.dtype), size, false, &all[2].span));
    FLORA_TRY(check_vector({"s"}, a.s, code(a.x.dtype), a.ds.size, false, &all[4].span));
    FLORA_TRY(check_contiguous("ds", a.ds));
    FLORA_TRY(check_contiguous("s", a.s));
    return check_all_apart(exec, all, 6, 2);
}

flora_status check_adamw(const flora_exec &exec, const flora_adamw_args &a) {
    if (a.dtype != FLORA_FP32 && a.dtype != FLORA_FP64)
        return fail(FLORA_BAD_ARGUMENT, "dtype must be fp32 or fp64, got %s (%d)", dtype_name(a.dtype), a.dtype);
    if (a.reserved) return fail(FLORA_BAD_ARGUMENT, "reserved must be 0, got %d", a.reserved);
    Named all[5] = {{"param", {}}, {"exp_avg", {}}, {"exp_avg_sq", {}}, {"grad", {}}, {"hyper", {}}};
    const void *const buffers[] = {a.param, a.exp_avg, a.exp_avg_sq, a.grad};
    for (int i = 0; i < 4; ++i)
        FLORA_TRY(check_array({all[i].name}, buffers[i], a.numel, element_bytes(a.dtype), &all[i].span));
    FLORA_TRY(check_matrix({"hyper"}, a.hyper, WIDE_FLOATS, -1, 7, false, &all[4].span));
    Span span;
    int64_t count = a.num_segments;
    if (count < 0 || count > INT32_MAX)
        return fail(FLORA_BAD_ARGUMENT, "num_segments must be between 0 and 2^31 - 1, got %lld", wide(count));
    FLORA_TRY(check_array({"segment_offsets"}, a.segment_offsets, count + 1, 8, &span));
    if (a.owner) FLORA_TRY(check_array({"owner"}, a.owner, count, 4, &span));
    if (!a.owner && count > a.hyper.rows)
        return fail(FLORA_BAD_ARGUMENT, "hyper must have a row for each of %lld segments, got %lld", wide(count),
                    wide(a.hyper.rows));
    if (exec.device == FLORA_CPU) {
        FLORA_TRY(check_offsets({"segment_offsets"}, a.segment_offsets, count, a.numel));
        for (int64_t i = 0; a.owner && i < count; ++i)
            if (a.owner[i] < 0 || a.owner[i] >= a.hyper.rows)
                return fail(FLORA_BAD_ARGUMENT, "owner[%lld] must name one of %lld rows of hyper, got %d", wide(i),
                            wide(a.hyper.rows), a.owner[i]);
    }
    return check_all_apart(exec, all, 5, 3);
}

}  // namespace flora
