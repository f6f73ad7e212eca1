// Each client's part of a packed batch, and the products of expand.
#pragma once

#include "run.h"

namespace flora {
namespace FLORA_ISA {

struct Client {
    int64_t token, tokens; // the first and how many
    int64_t rank, ranks;
    int64_t flat; // where its block of S starts
    double scale;
    bool drops;
    Draws draws;
};

// Goes through the clients in order.
struct Clients {
    const flora_clients *table;
    int64_t index, flat;

    bool next(Client &client) {
        if (index >= table->num_clients) return false;
        const int64_t c = index++;
        client.token = table->token_offsets[c], client.tokens = table->token_offsets[c + 1] - client.token;
        client.rank = table->rank_offsets[c], client.ranks = table->rank_offsets[c + 1] - client.rank;
        client.flat = flat;
        flat += client.tokens * client.ranks;
        client.scale = !table->scaling                        ? 1.0
                       : table->scaling_dtype == FLORA_FP32 ? static_cast<const float *>(table->scaling)[c]
                                                              : static_cast<const double *>(table->scaling)[c];
        client.drops = table->q && table->q[c] > 0;
        client.draws = {};
        if (client.drops) {
            int32_t q = table->q[c];
            client.draws = {table->seed[c], table->first_row ? table->first_row[c] : 0, q, 0, 65536.0 / (65536 - q)};
        }
        return true;
    }
};

FLORA_INLINE bool is_half(int32_t dtype) { return dtype == FLORA_BF16 || dtype == FLORA_FP16; }

// Where an element lies; unsigned, as a client without rows may start beyond a matrix of any stride.
FLORA_INLINE void *element_at(const void *data, int32_t dtype, int64_t row, int64_t stride) {
    uint64_t bytes = is_half(dtype) ? 2 : dtype == FLORA_FP64 ? 8 : 4;
    uint64_t ahead = static_cast<uint64_t>(row) * static_cast<uint64_t>(stride) * bytes;
    return reinterpret_cast<void *>(reinterpret_cast<uintptr_t>(data) + ahead);
}

// Whether rows of a matrix may be read as T where they lie.
template <class T>
FLORA_INLINE bool is_plain(const flora_matrix &m) {
    return m.dtype == (sizeof(T) == 8 ? FLORA_FP64 : FLORA_FP32) && step(m.columns, m.column_stride) == 1;
}

// Rows of a matrix from `row` on, as an operand whose inner axis they are.
FLORA_INLINE Operand rows_of(const flora_matrix &m, int64_t row, int32_t via) {
    return {element_at(m.data, m.dtype, row, m.row_stride), step(m.rows, m.row_stride),
            step(m.columns, m.column_stride), m.dtype, is_half(via) && m.dtype == FLORA_FP32 ? via : 0};
}

FLORA_INLINE void set_out(Product &job, const flora_matrix &m, int64_t row) {
    job.out = element_at(m.data, m.dtype, row, m.row_stride);
    job.row_stride = step(m.rows, m.row_stride), job.column_stride = step(m.columns, m.column_stride);
    job.out_dtype = m.dtype;
}

// Y_c += s_c mask(S_c B_c).
struct ExpandProducts {
    const flora_expand_args *args;
    Clients clients;

    bool operator()(Product &job) {
        Client c;
        if (!clients.next(c)) return false;
        job = {};
        job.rows = c.tokens, job.columns = args->y.columns, job.inner = c.ranks, job.scale = c.scale;
        job.left = {element_at(args->s.data, args->s.dtype, c.flat, 1), 1, c.ranks, args->s.dtype, 0};
        job.right = rows_of(args->B, c.rank, args->y.dtype);
        set_out(job, args->y, c.token);
        job.mode = c.drops ? ADD_MASKED : ADD;
        job.draws = c.draws;
        return true;
    }
};

template <class Next>
static size_t product_workspace(const flora_exec &exec, int32_t dtype, Next next) {
    int threads = team_size(exec.num_threads);
    return dtype == FLORA_FP64 ? workspace_of<double>(next, threads, nullptr, nullptr)
                               : workspace_of<float>(next, threads, nullptr, nullptr);
}

template <class Next>
static flora_status run_products(const flora_exec &exec, int32_t dtype, Next next) {
    if (dtype == FLORA_FP64) run<double>(next, exec);
    else run<float>(next, exec);
    return FLORA_OK;
}

static flora_status expand_workspace(const flora_exec &exec, const flora_expand_args &args, size_t *bytes) {
    *bytes = product_workspace(exec, args.y.dtype, ExpandProducts{&args, {&args.clients, 0, 0}});
    return FLORA_OK;
}

static flora_status expand(const flora_exec &exec, const flora_expand_args &args) {
    return run_products(exec, args.y.dtype, ExpandProducts{&args, {&args.clients, 0, 0}});
}

}  // namespace FLORA_ISA
}  // namespace flora
