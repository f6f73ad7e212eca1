// merge: W += B^T diag(coef) A, one or many.
#pragma once

#include "backend.h"
#include "run.h"

namespace flora {
namespace FLORA_ISA {

FLORA_INLINE Operand stacked(const flora_matrix &matrix) {
    return {matrix.data, step(matrix.rows, matrix.row_stride), step(matrix.columns, matrix.column_stride),
            matrix.dtype, 0};
}

static Product merge_product(const flora_merge_item &item, const flora_merge_options &options) {
    Product job = {};
    const flora_matrix &W = item.weight;
    job.rows = W.rows, job.columns = W.columns, job.inner = item.A.rows;
    job.left = stacked(item.B), job.right = stacked(item.A);
    job.coef = item.coef.data, job.coef_stride = step(item.coef.size, item.coef.stride);
    job.coef_dtype = item.coef.dtype, job.scale = 1;
    job.out = W.data, job.out_dtype = W.dtype;
    job.row_stride = step(W.rows, W.row_stride), job.column_stride = step(W.columns, W.column_stride);
    job.low = static_cast<int16_t *>(item.low_bits.data);
    job.low_row_stride = step(W.rows, item.low_bits.row_stride);
    job.low_column_stride = step(W.columns, item.low_bits.column_stride);
    job.mode = job.low ? ADD_LOW_BITS : options.rounding == FLORA_STOCHASTIC ? ADD_STOCHASTIC : ADD;
    job.draws = {item.seed, 0, 0, 1, 1};
    // A transposed weight (Conv1D) is merged as its contiguous transpose; but draws are counted by row and column.
    if (job.mode != ADD_STOCHASTIC && job.column_stride != 1 && job.row_stride == 1) {
        Product turned = job;
        turned.rows = job.columns, turned.columns = job.rows, turned.left = job.right, turned.right = job.left;
        turned.row_stride = job.column_stride, turned.column_stride = job.row_stride;
        turned.low_row_stride = job.low_column_stride, turned.low_column_stride = job.low_row_stride;
        return turned;
    }
    return job;
}

// The items that are summed in float, or those that are summed in double.
struct MergeProducts {
    const MergeItems *items;
    const flora_merge_options *options;
    bool wide;
    int64_t index;

    bool operator()(Product &job) {
        for (; index < items->count; ++index) {
            const flora_merge_item &item = (*items)[index];
            if ((options->accumulate == FLORA_FP64 || item.weight.dtype == FLORA_FP64) != wide) continue;
            job = merge_product(item, *options);
            ++index;
            return true;
        }
        return false;
    }
};

static flora_status merge_workspace(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options,
                                    size_t *bytes) {
    int threads = team_size(exec.num_threads);
    size_t narrow = workspace_of<float>(MergeProducts{&items, &options, false, 0}, threads, nullptr, nullptr);
    size_t wide = workspace_of<double>(MergeProducts{&items, &options, true, 0}, threads, nullptr, nullptr);
    *bytes = narrow > wide ? narrow : wide;
    return FLORA_OK;
}

static flora_status merge(const flora_exec &exec, const MergeItems &items, const flora_merge_options &options) {
    run<float>(MergeProducts{&items, &options, false, 0}, exec);
    run<double>(MergeProducts{&items, &options, true, 0}, exec);
    return FLORA_OK;
}

}  // namespace FLORA_ISA
}  // namespace flora
