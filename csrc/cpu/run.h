// Run a sequence of products with all threads in one parallel region, allocating nothing.
//
// Each product is cut into blocks of columns whose packed right side fits PANEL_BYTES. Threads pack a block together,
// wait for each other once, and take tasks (a block of rows; the last ones are cut into ranges of columns) from a
// counter. Packed blocks alternate between two buffers, so that a thread that is done goes on to pack the next block.
// Who computes a tile does not change its bits.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "product.h"

namespace flora {
namespace FLORA_ISA {

// The packed right side lies in the outer caches; as wide as W where that fits, since rows of W are then read in order.
constexpr int64_t PANEL_BYTES = 4 << 20;
// A task's packed left side lies in L2.
constexpr int64_t LEFT_BYTES = 128 << 10;
constexpr int64_t TASKS_PER_THREAD = 16;

FLORA_INLINE int team_size(int32_t wanted) {
#ifdef _OPENMP
    return wanted > 0 ? wanted : omp_get_max_threads();
#else
    (void)wanted;
    return 1;
#endif
}

FLORA_INLINE size_t aligned(size_t bytes) {
    return (bytes + FLORA_WORKSPACE_ALIGNMENT - 1) / FLORA_WORKSPACE_ALIGNMENT * FLORA_WORKSPACE_ALIGNMENT;
}

// How a product is cut.
struct Blocks {
    int64_t columns;    // of a block
    int64_t panel_rows; // rows of a left panel, the last may have fewer
    int64_t task_rows;  // a multiple of panel_rows, at most GROUP times it
    int64_t whole;      // so many blocks of rows are one task each, all columns; the rest are cut
    int64_t task_columns;
};

template <class T>
static Blocks cut(const Product &job, int threads) {
    constexpr int64_t WIDTH = PRODUCT_COLUMNS<T>;
    int64_t column_bytes = larger(job.inner, 1) * static_cast<int64_t>(sizeof(T));
    int64_t most = larger(WIDTH, PANEL_BYTES / column_bytes / WIDTH * WIDTH);
    int64_t blocks = larger(1, ceil_div(job.columns, most));
    Blocks cut;
    cut.columns = ceil_div(ceil_div(job.columns, blocks), WIDTH) * WIDTH;
    // Panels of even height: 128 rows are fifteen of 9 or 8, not fourteen of 9 and one of 2.
    int64_t panels = larger(1, ceil_div(job.rows, PRODUCT_ROWS));
    cut.panel_rows = larger(1, ceil_div(job.rows, panels));
    int64_t groups = larger(1, ceil_div(panels, smaller(GROUP, larger(1, LEFT_BYTES / (column_bytes * PRODUCT_ROWS)))));
    cut.task_rows = ceil_div(panels, groups) * cut.panel_rows;
    // The last ones are cut among the threads, each of which packs the left side for itself.
    groups = ceil_div(larger(job.rows, 1), cut.task_rows);
    int64_t rest = threads == 1 ? 0 : smaller(groups, threads);
    cut.whole = groups - rest;
    int64_t splits = smaller(ceil_div(threads * TASKS_PER_THREAD, larger(rest, 1)), cut.columns / WIDTH);
    // Without a column there is nothing to cut.
    cut.task_columns = larger(1, ceil_div(ceil_div(cut.columns, larger(splits, 1)), WIDTH)) * WIDTH;
    return cut;
}

// Bytes of the workspace's parts for one product.
struct Need {
    size_t right, left;
};

template <class T>
static Need need(const Product &job, int threads) {
    Blocks cut_ = cut<T>(job, threads);
    size_t inner = static_cast<size_t>(larger(job.inner, 1)) * sizeof(T);
    return {aligned(inner * static_cast<size_t>(cut_.columns)), aligned(inner * static_cast<size_t>(cut_.task_rows))};
}

struct Buffers {
    char *right[2];
    char *left;
    size_t left_bytes; // of one thread
    bool together;     // all right sides lie one after another, and not in turns
};

// Counters of the two alternating steps.
struct Counters {
    int64_t packed[2], done[2];
};

FLORA_INLINE int64_t take(int64_t *counter) { return __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED); }

FLORA_INLINE void wait_for_all() {
#ifdef _OPENMP
#pragma omp barrier
#endif
}

FLORA_INLINE int thread_index() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// A thread's turns at a counter that goes through one piece of work after another.
struct Turns {
    int64_t *counter, now, before;

    explicit Turns(int64_t *counter) : counter(counter), now(take(counter)), before(0) {}
    // do_it(turn) for those of the next `count` turns that are this thread's.
    template <class F>
    void each(int64_t count, F do_it) {
        for (; now < before + count; now = take(counter)) do_it(now - before);
        before += count;
    }
};

template <class T>
static void pack_block(const Product &job, int64_t column, int64_t end, char *buffer, Turns &turns) {
    constexpr int64_t WIDTH = PRODUCT_COLUMNS<T>;
    // Runs of panels long enough to be worth a turn at the counter.
    int64_t run = larger(1, 32768 / larger(1, job.inner * WIDTH)) * WIDTH;
    turns.each(ceil_div(end - column, run), [&](int64_t turn) {
        int64_t start = column + turn * run;
        pack_right<T>(job, start, smaller(end, start + run),
                      reinterpret_cast<T *>(buffer) + (start - column) * job.inner);
    });
}

template <class T>
static void compute_block(const Product &job, const Blocks &cut, int64_t column, int64_t end, const char *right,
                          T *left, Turns &turns) {
    int64_t across = ceil_div(end - column, cut.task_columns), whole = cut.whole;
    int64_t tasks = whole + (ceil_div(job.rows, cut.task_rows) - whole) * across;
    int64_t packed = -1;
    turns.each(tasks, [&](int64_t task) {
        int64_t group = task < whole ? task : whole + (task - whole) / across;
        int64_t row = group * cut.task_rows, last = smaller(job.rows, row + cut.task_rows);
        int64_t start = column + (task < whole ? 0 : (task - whole) % across * cut.task_columns);
        int64_t stop = task < whole ? end : smaller(end, start + cut.task_columns);
        if (packed != row) pack_left<T>(job, row, last, static_cast<int>(cut.panel_rows), left);
        packed = row;
        group_of_tiles<T>(job, left, row, last, static_cast<int>(cut.panel_rows),
                          reinterpret_cast<const T *>(right) + (start - column) * job.inner, start, stop);
    });
}

FLORA_INLINE bool is_empty(const Product &job) { return job.rows == 0 || job.columns == 0 || job.inner == 0; }

// One thread's part. `next` gives the products one after another, to every thread the same.
template <class T, class Next>
static void work(Next next, int threads, const Buffers &buffers, Counters *counters) {
    int64_t step = 0;
    T *left = reinterpret_cast<T *>(buffers.left + buffers.left_bytes * static_cast<size_t>(thread_index()));
    for (Product job; next(job);) {
        if (is_empty(job)) continue;
        Blocks blocks = cut<T>(job, threads);
        for (int64_t column = 0; column < job.columns; column += blocks.columns, ++step) {
            int64_t end = smaller(job.columns, column + blocks.columns), now = step % 2;
            Turns packing(&counters->packed[now]);
            pack_block<T>(job, column, end, buffers.right[now], packing);
            wait_for_all();
            // Everybody has left these two counters; they are used again only after the next wait.
            if (thread_index() == 0) counters->packed[now] = counters->done[1 - now] = 0;
            Turns computing(&counters->done[now]);
            compute_block<T>(job, blocks, column, end, buffers.right[now], left, computing);
        }
    }
}

// The same where all packed right sides fit side by side: threads wait for each other once and not once for each client.
template <class T, class Next>
static void work_together(Next next, int threads, bool plenty, int64_t jobs, const Buffers &buffers,
                          Counters *counters) {
    T *left = reinterpret_cast<T *>(buffers.left + buffers.left_bytes * static_cast<size_t>(thread_index()));
    char *right = buffers.right[0];
    Turns packing(&counters->packed[0]), computing(&counters->done[0]);
    Next again = next;
    for (Product job; next(job);) {
        if (is_empty(job)) continue;
        pack_block<T>(job, 0, job.columns, right, packing);
        right += need<T>(job, threads).right;
    }
    wait_for_all();
    right = buffers.right[0];
    for (Product job; again(job);) {
        --jobs;
        if (is_empty(job)) continue;
        // Where tasks are plenty, those of the last product are the only small ones.
        Blocks blocks = cut<T>(job, plenty && jobs ? 1 : threads);
        compute_block<T>(job, blocks, 0, job.columns, right, left, computing);
        right += need<T>(job, threads).right;
    }
}

template <class T, class Next>
static size_t workspace_of(Next next, int threads, Buffers *buffers, char *base) {
    Need most = {0, 0};
    size_t all = 0;
    for (Product job; next(job);) {
        Need one = need<T>(job, threads);
        if (one.right > most.right) most.right = one.right;
        if (one.left > most.left) most.left = one.left;
        all += aligned(static_cast<size_t>(larger(job.inner, 1) * ceil_div(job.columns, PRODUCT_COLUMNS<T>)) *
                       PRODUCT_COLUMNS<T> * sizeof(T));
    }
    const bool together = all <= static_cast<size_t>(PANEL_BYTES);
    const size_t right = together ? all : 2 * most.right;
    if (buffers) *buffers = {{base, base + most.right}, base + right, most.left, together};
    return right + most.left * static_cast<size_t>(threads);
}

// Work that is not worth waking other threads for.
constexpr double SMALL = 1 << 20;

template <class T, class Next>
static void run(Next next, const flora_exec &exec) {
    int threads = team_size(exec.num_threads);
    Buffers buffers;
    workspace_of<T>(next, threads, &buffers, static_cast<char *>(exec.workspace));
    double products = 0;
    int64_t whole = 0, jobs = 0;
    Next all = next;
    for (Product job; all(job);) {
        products += static_cast<double>(job.rows) * static_cast<double>(job.columns) * static_cast<double>(job.inner);
        whole += cut<T>(job, 1).whole, ++jobs;
    }
    Counters counters = {};
    (void)products;
    const bool plenty = whole >= TASKS_PER_THREAD * threads / 2;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (products > SMALL)
#endif
    {
        if (buffers.together) work_together<T>(next, threads, plenty, jobs, buffers, &counters);
        else work<T>(next, threads, buffers, &counters);
    }
}

}  // namespace FLORA_ISA
}  // namespace flora
