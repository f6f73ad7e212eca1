/* The kernels of FLoRA behind a plain C interface, for the CPU and for CUDA.
 *
 *     merge    W   += B^T diag(coef) A                      W (N, K), A (P, K), B (P, N), coef (P)
 *     shrink   S_c  = s_c drop(X_c) A_c^T                   X_c = rows of client c in X, A_c = its rows in A
 *     expand   Y_c += s_c mask_c(S_c B_c)                   mask: what drop() keeps, scaled up; all if no dropout
 *     wgrad    dA_c = dS_c^T drop(X_c),  dB_c = s_c S_c^T dY_c
 *     adamw    Adam with decoupled weight decay over flat buffers, each client with its own settings
 *
 * Letters: M packed tokens, K in_features, N out_features, R one client's rank, P sum of ranks, C clients.
 *
 * Rules that hold for every function here:
 * - It allocates nothing, throws nothing and keeps no pointer. What it needs beyond its arguments is a workspace that
 *   the caller owns; the function of the same name with `_workspace` at its end tells how many bytes.
 * - On CUDA it enqueues on `exec->stream` and does not synchronise; on the CPU it returns when the work is done.
 *   Every pointer inside matrices, vectors and tables is a pointer of that device; the structs themselves are always
 *   host memory and may go away as soon as the function returns. Calls may be captured in a CUDA graph; the first call
 *   of each kind must not be, because CUDA loads a kernel when it is first launched.
 * - It returns FLORA_OK or says why not: a code, and flora_last_error(), whose text names the argument, what was
 *   expected, what came and what to do. Arguments are checked before anything is written, so whatever is refused
 *   leaves every output as it was. (What lies in CUDA memory, the tables of clients, is not read for checks.)
 * - Results do not depend on the number of threads, on what else is in the call, nor on the workspace's contents;
 *   sums are made in a fixed order, without atomics.
 * - What is not finite, in a matrix, coef or scaling, is no error: it goes where the formula takes it, and a client's
 *   stays with that client.
 * - Every struct that a function takes starts with its own size; set it with the *_INIT macro, which makes all else
 *   zero. Later versions only add fields at its end, for which zero means what this version does.
 */
#ifndef FLORA_KERNELS_H
#define FLORA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#define FLORA_API __declspec(dllexport)
#else
#define FLORA_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The interface's version: the major number changes when a program must be compiled anew. */
#define FLORA_ABI_MAJOR 1
#define FLORA_ABI_MINOR 0

/* What a function returns. */
typedef int32_t flora_status;
enum {
    FLORA_OK = 0,
    FLORA_BAD_ARGUMENT = 1,   /* null, misaligned, a size or stride or code that does not fit, an overflow */
    FLORA_OVERLAP = 2,        /* an output shares memory with something else */
    FLORA_BAD_WORKSPACE = 3,  /* null, misaligned or too small */
    FLORA_UNSUPPORTED = 4,    /* what this device has no kernel for: dtypes, options, sizes past its grid, memory */
    FLORA_NO_DEVICE = 5,      /* the device is not there, or the library was built without it */
    FLORA_DEVICE_ERROR = 6    /* the device's own runtime refused */
};

/* Element types. */
enum { FLORA_FP32 = 1, FLORA_BF16 = 2, FLORA_FP16 = 3, FLORA_FP64 = 4, FLORA_INT16 = 5 };

enum { FLORA_CPU = 0, FLORA_CUDA = 1 };

/* How a merge rounds to a 16-bit weight. */
enum {
    FLORA_NEAREST = 0,   /* to nearest, ties to even */
    FLORA_STOCHASTIC = 1 /* bf16 only: up or down with the odds of the bits that are cut off */
};

/* Instruction sets of the CPU; AUTO takes the best that the processor has. */
enum { FLORA_ISA_AUTO = 0, FLORA_ISA_PORTABLE = 1, FLORA_ISA_AVX2 = 2, FLORA_ISA_AVX512 = 3 };

/* Where and with what a function runs. */
typedef struct flora_exec {
    size_t struct_size;
    int32_t device;         /* FLORA_CPU or FLORA_CUDA */
    int32_t device_index;   /* which GPU; must be 0 on the CPU */
    void *stream;           /* cudaStream_t; NULL is the default stream. Not used on the CPU */
    void *workspace;        /* of the device, aligned to FLORA_WORKSPACE_ALIGNMENT; NULL where 0 bytes are needed */
    size_t workspace_bytes; /* at least what the _workspace function tells for the same exec and arguments */
    int32_t num_threads;    /* CPU: 0 takes OpenMP's default. Not used on CUDA */
    int32_t isa;            /* CPU: FLORA_ISA_*. Not used on CUDA */
} flora_exec;

#define FLORA_WORKSPACE_ALIGNMENT 256

/* Two axes of elements; strides are counted in elements, and may be negative in inputs. An output may have no two
 * elements in one place. `data` is aligned to its element; it may be NULL where there are no elements. */
typedef struct flora_matrix {
    void *data;
    int64_t rows, columns;
    int64_t row_stride, column_stride;
    int32_t dtype;
    int32_t reserved; /* 0 */
} flora_matrix;

/* One axis of elements. */
typedef struct flora_vector {
    void *data;
    int64_t size;
    int64_t stride;
    int32_t dtype;
    int32_t reserved; /* 0 */
} flora_vector;

/* How the clients share the rows of X (tokens) and of the bank (ranks), and each client's own numbers.
 * Client c has the tokens token_offsets[c] .. token_offsets[c + 1] and the bank's rows rank_offsets[c] ..
 * rank_offsets[c + 1]; both tables have num_clients + 1 entries, start at 0, never fall, and end at M and P.
 * S is flat: client c's block of m_c x r_c numbers, row by row, follows client c - 1's.
 *
 * Dropout of client c keeps the element (row, column) of its X where draw >= q[c], and scales it by
 * 65536 / (65536 - q[c]); what is dropped is exactly 0 even where X is not finite. The draw is a 16-bit half of
 * Philox4x32-7 (Salmon et al., SC 2011) with the key seed[c] (low word, high word) and the counter
 * (column / 8, first_row[c] + row, 0, 0), where row counts the client's own tokens: draw column % 8 is a half of word
 * (column % 8) / 2, the low half first. first_row[c] + m_c must not exceed 2^32. */
typedef struct flora_clients {
    int64_t num_clients;
    const int32_t *token_offsets;
    const int32_t *rank_offsets;
    const void *scaling;      /* s_c, NULL for 1 */
    const int32_t *q;         /* 0 .. 65536, NULL for no dropout; then seed must be there */
    const int64_t *seed;
    const int64_t *first_row; /* NULL for 0 */
    int32_t scaling_dtype;    /* FLORA_FP32 or FLORA_FP64 */
    int32_t max_rank;         /* CUDA: no client's rank is higher (it may size a grid); 0 where that is not known */
} flora_clients;

/* One weight of a merge with its stack: W (N, K), A (P, K), B (P, N), coef (P), each of any float dtype.
 * With low_bits (int16, N x K; else data = NULL) a bf16 W is the upper part of an fp32 master, which is what is
 * updated: bits(master) = (bits(W) << 16) + low, low signed; W is the master rounded to nearest, ties away from zero.
 * `seed` is the key of stochastic rounding: the draw of element (row, column) is that of dropout with first_row = 0 and
 * the last word of the counter 1 instead of 0; it is added to the fp32 bits of the sum, whose upper half is kept. What
 * is not finite is cut without a draw. */
typedef struct flora_merge_item {
    size_t struct_size;
    flora_matrix weight;
    flora_matrix A;
    flora_matrix B;
    flora_vector coef;
    flora_matrix low_bits;
    int64_t seed;
} flora_merge_item;

/* The sum, with W in it, is made in `accumulate` (FLORA_FP32 or FLORA_FP64; always FLORA_FP64 for an fp64 W) and
 * rounded to W's dtype once (a 16-bit weight summed in float64 goes through fp32). */
typedef struct flora_merge_options {
    size_t struct_size;
    int32_t rounding;
    int32_t accumulate;
} flora_merge_options;

/* S_c = s_c drop(X_c) A_c^T; sums in fp32 (fp64 for an fp64 x), rounded once. The gradient dS = s dY B^T is the same
 * with dY for x and B for A. A is rounded to the dtype of x first, where x has 16 bits and A is an fp32 master. */
typedef struct flora_shrink_args {
    size_t struct_size;
    flora_matrix x; /* M, K */
    flora_matrix A; /* P, K */
    flora_vector s; /* sum of m_c r_c, stride 1, in the dtype of x; written */
    flora_clients clients;
} flora_shrink_args;

/* Y_c += s_c mask(S_c B_c), rounded once. The gradient dX += mask(dS A) is the same with dS for s and A for B. B is
 * rounded to the dtype of y first, as A is in shrink. Clients without rank keep their rows as they are. */
typedef struct flora_expand_args {
    size_t struct_size;
    flora_matrix y; /* M, N; updated */
    flora_vector s; /* sum of m_c r_c, stride 1, in the dtype of y */
    flora_matrix B; /* P, N */
    flora_clients clients;
} flora_expand_args;

/* dA_c = dS_c^T drop(X_c) and dB_c = s_c S_c^T dY_c; a client without tokens gets zeros. */
typedef struct flora_wgrad_args {
    size_t struct_size;
    flora_vector ds; /* sum of m_c r_c, stride 1, in the dtype of x */
    flora_matrix x;  /* M, K */
    flora_vector s;  /* like ds */
    flora_matrix dy; /* M, N, in the dtype of x */
    flora_matrix dA; /* P, K, in the dtype of x or fp32; written */
    flora_matrix dB; /* P, N, in the dtype of dA; written */
    flora_clients clients;
} flora_wgrad_args;

/* Segment i covers the elements segment_offsets[i] .. segment_offsets[i + 1] (num_segments + 1 entries from 0 to numel)
 * and takes row owner[i] of `hyper`: lr, beta1, beta2, eps, weight decay, step (1 for the first; 0 leaves the segment
 * untouched), scale of the gradient. As torch.optim.AdamW computes it. */
typedef struct flora_adamw_args {
    size_t struct_size;
    void *param;                    /* contiguous, numel elements each; param and both averages are updated */
    const void *grad;
    void *exp_avg;
    void *exp_avg_sq;
    int64_t numel;
    int32_t dtype;                  /* FLORA_FP32 or FLORA_FP64, of all four */
    int32_t reserved;               /* 0 */
    int64_t num_segments;
    const int64_t *segment_offsets;
    const int32_t *owner;           /* NULL: segment i takes row i */
    flora_matrix hyper;             /* C, 7; FLORA_FP32 or FLORA_FP64 */
} flora_adamw_args;

/* All fields are spelled out, as compilers warn of what is left out. */
#define FLORA_MATRIX_INIT {NULL, 0, 0, 0, 0, 0, 0}
#define FLORA_VECTOR_INIT {NULL, 0, 0, 0, 0}
#define FLORA_CLIENTS_INIT {0, NULL, NULL, NULL, NULL, NULL, NULL, 0, 0}
#define FLORA_EXEC_INIT {sizeof(flora_exec), FLORA_CPU, 0, NULL, NULL, 0, 0, FLORA_ISA_AUTO}
#define FLORA_MERGE_ITEM_INIT                                                                                          \
    {sizeof(flora_merge_item), FLORA_MATRIX_INIT, FLORA_MATRIX_INIT, FLORA_MATRIX_INIT, FLORA_VECTOR_INIT,             \
     FLORA_MATRIX_INIT, 0}
#define FLORA_MERGE_OPTIONS_INIT {sizeof(flora_merge_options), FLORA_NEAREST, FLORA_FP32}
#define FLORA_SHRINK_ARGS_INIT                                                                                         \
    {sizeof(flora_shrink_args), FLORA_MATRIX_INIT, FLORA_MATRIX_INIT, FLORA_VECTOR_INIT, FLORA_CLIENTS_INIT}
#define FLORA_EXPAND_ARGS_INIT                                                                                         \
    {sizeof(flora_expand_args), FLORA_MATRIX_INIT, FLORA_VECTOR_INIT, FLORA_MATRIX_INIT, FLORA_CLIENTS_INIT}
#define FLORA_WGRAD_ARGS_INIT                                                                                          \
    {sizeof(flora_wgrad_args), FLORA_VECTOR_INIT, FLORA_MATRIX_INIT, FLORA_VECTOR_INIT, FLORA_MATRIX_INIT,             \
     FLORA_MATRIX_INIT, FLORA_MATRIX_INIT, FLORA_CLIENTS_INIT}
#define FLORA_ADAMW_ARGS_INIT                                                                                          \
    {sizeof(flora_adamw_args), NULL, NULL, NULL, NULL, 0, 0, 0, 0, NULL, NULL, FLORA_MATRIX_INIT}

/* The library's version as text ("0.1.0"), and the interface's as FLORA_ABI_MAJOR * 1000 + FLORA_ABI_MINOR. */
FLORA_API const char *flora_version(void);
FLORA_API int32_t flora_abi_version(void);

/* Why this thread's last failed call failed: one line of English, kept until its next failure. Never NULL. */
FLORA_API const char *flora_last_error(void);

/* "FLORA_OK", "FLORA_BAD_ARGUMENT", ... */
FLORA_API const char *flora_status_name(flora_status status);

/* FLORA_OK if functions can run on this device; else flora_last_error() says what is missing. */
FLORA_API flora_status flora_device_available(int32_t device, int32_t device_index);

/* The best instruction set of this processor: FLORA_ISA_PORTABLE, FLORA_ISA_AVX2 or FLORA_ISA_AVX512. */
FLORA_API int32_t flora_cpu_isa(void);

/* The number of threads that num_threads = 0 means: 1 where the library was built without OpenMP. */
FLORA_API int32_t flora_cpu_threads(void);

/* One weight, or many in one call (on CUDA in one launch for each combination of dtypes). Items lie items->struct_size
 * bytes apart; weights and low bits of different items must not overlap, stacks may be shared. */
FLORA_API flora_status flora_merge(const flora_exec *exec, const flora_merge_item *item,
                                   const flora_merge_options *options);
FLORA_API flora_status flora_merge_many(const flora_exec *exec, const flora_merge_item *items, int64_t num_items,
                                        const flora_merge_options *options);
FLORA_API flora_status flora_shrink(const flora_exec *exec, const flora_shrink_args *args);
FLORA_API flora_status flora_expand(const flora_exec *exec, const flora_expand_args *args);
FLORA_API flora_status flora_wgrad(const flora_exec *exec, const flora_wgrad_args *args);
FLORA_API flora_status flora_adamw(const flora_exec *exec, const flora_adamw_args *args);

/* How many bytes of workspace the call with the same arguments needs, into *bytes: a multiple of
 * FLORA_WORKSPACE_ALIGNMENT, as aligned_alloc wants it, and no byte beyond them is touched. Of exec only device, device_index,
 * num_threads and isa are read; of the arguments only sizes, strides and dtypes, and on the CPU the clients' tables. */
FLORA_API flora_status flora_merge_many_workspace(const flora_exec *exec, const flora_merge_item *items,
                                                  int64_t num_items, const flora_merge_options *options, size_t *bytes);
FLORA_API flora_status flora_shrink_workspace(const flora_exec *exec, const flora_shrink_args *args, size_t *bytes);
FLORA_API flora_status flora_expand_workspace(const flora_exec *exec, const flora_expand_args *args, size_t *bytes);
FLORA_API flora_status flora_wgrad_workspace(const flora_exec *exec, const flora_wgrad_args *args, size_t *bytes);
FLORA_API flora_status flora_adamw_workspace(const flora_exec *exec, const flora_adamw_args *args, size_t *bytes);

#ifdef __cplusplus
}
#endif

#endif /* FLORA_KERNELS_H */
