/* Merge a stack into a weight from C: W += B^T diag(coef) A. docs/embedding.md tells how to build it. */
#include <flora_kernels.h>
#include <stdio.h>
#include <stdlib.h>

enum { N = 4, K = 6, P = 2 };

int main(void) {
    float W[N * K] = {0}, A[P * K], B[P * N], coef[P] = {0.5f, 2.0f};
    for (int i = 0; i < P * K; ++i) A[i] = (float)i;
    for (int i = 0; i < P * N; ++i) B[i] = (float)(i + 1);

    flora_merge_item item = FLORA_MERGE_ITEM_INIT;
    item.weight = (flora_matrix){W, N, K, K, 1, FLORA_FP32, 0};
    item.A = (flora_matrix){A, P, K, K, 1, FLORA_FP32, 0};
    item.B = (flora_matrix){B, P, N, N, 1, FLORA_FP32, 0};
    item.coef = (flora_vector){coef, P, 1, FLORA_FP32, 0};
    flora_merge_options options = FLORA_MERGE_OPTIONS_INIT;
    flora_exec exec = FLORA_EXEC_INIT;

    flora_status status = flora_merge_many_workspace(&exec, &item, 1, &options, &exec.workspace_bytes);
    exec.workspace = aligned_alloc(FLORA_WORKSPACE_ALIGNMENT, exec.workspace_bytes);
    if (status == FLORA_OK) status = flora_merge(&exec, &item, &options);
    free(exec.workspace);
    if (status != FLORA_OK) return fprintf(stderr, "%s\n", flora_last_error()), 1;
    for (int i = 0; i < N * K; ++i) printf("%g%c", W[i], i % K == K - 1 ? '\n' : ' ');
    return 0;
}
