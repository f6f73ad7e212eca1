// Random arguments for the C interface, most of them almost right: fuzz SEED CALLS. Built with sanitizers by the tests.
//
// Every matrix lies in one arena. Whatever is refused must say why and write nothing; whatever is accepted must lie in
// no other argument and must change nothing but its outputs. A call that is accepted but reaches beyond the arena,
// which the library cannot know, is not made.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "flora_kernels.h"

static std::mt19937_64 source;
static int64_t below(int64_t n) { return static_cast<int64_t>(source() % static_cast<uint64_t>(n)); }
static bool chance(int percent) { return below(100) < percent; }

static constexpr int64_t ARENA = 1 << 19;
alignas(256) static unsigned char arena[ARENA], before[ARENA];
static int64_t fresh = 0;

struct Range {
    const char *low, *high;
};
// What the library was told, as byte ranges; the outputs first.
static std::vector<Range> outputs, inputs;
static bool outside = false;

static const int64_t WEIRD[] = {-1, 0, 1, 2, 3, INT64_MAX, INT64_MIN, INT64_MAX / 2, 1LL << 32, -(1LL << 40)};
static int64_t weird() { return WEIRD[below(10)]; }

static int64_t bytes_of(int32_t dtype) { return dtype == FLORA_FP32 ? 4 : dtype == FLORA_FP64 ? 8 : 2; }

static void *place(int64_t bytes) {
    int64_t at = chance(3) ? below(ARENA) : fresh;
    fresh = (fresh + bytes + 64) / 8 * 8;
    if (fresh > ARENA / 2) fresh = 0;
    return chance(1) ? nullptr : arena + at + (chance(1) ? 1 : 0);
}

// Remember a range as the library should see it; in double, where nothing wraps.
static void remember(const flora_matrix &m, bool output) {
    if (m.rows <= 0 || m.columns <= 0 || !m.data) return;
    double low = 0, high = 1;
    for (double reach : {(m.rows - 1.0) * static_cast<double>(m.row_stride),
                         (m.columns - 1.0) * static_cast<double>(m.column_stride)})
        (reach < 0 ? low : high) += reach;
    double base = static_cast<double>(static_cast<unsigned char *>(m.data) - arena);
    double size = static_cast<double>(bytes_of(m.dtype));
    low = base + low * size, high = base + high * size;
    outside = outside || low < 0 || high > ARENA;
    if (outside) return;
    const char *start = reinterpret_cast<const char *>(arena);
    (output ? outputs : inputs).push_back({start + static_cast<int64_t>(low), start + static_cast<int64_t>(high)});
}

static flora_matrix matrix(int64_t rows, int64_t columns, int32_t dtype, bool output) {
    int64_t pad = chance(30) ? below(5) : 0;
    flora_matrix m = {place(rows * (columns + pad) * bytes_of(dtype)), rows, columns, columns + pad, 1, dtype, 0};
    if (chance(10)) m.row_stride = 1, m.column_stride = rows;
    if (chance(2)) m.rows = weird();
    if (chance(2)) m.columns = weird();
    if (chance(2)) m.row_stride = weird();
    if (chance(2)) m.column_stride = weird();
    if (chance(2)) m.dtype = static_cast<int32_t>(weird());
    if (chance(1)) m.reserved = 1;
    remember(m, output);
    return m;
}

static flora_vector vector(int64_t size, int32_t dtype, bool output) {
    flora_matrix m = matrix(1, size, dtype, false);
    inputs.clear();
    flora_vector v = {m.data, m.columns, chance(95) ? 1 : weird(), m.dtype, m.reserved};
    remember({v.data, 1, v.size, 0, v.stride, v.dtype, 0}, output);
    return v;
}

static int32_t any_float() { return static_cast<int32_t>(1 + below(4)); }

static std::vector<int32_t> tokens, ranks, q;
static std::vector<int64_t> seeds, rows;
static std::vector<double> scaling;

static int64_t offsets(std::vector<int32_t> &table, int64_t clients, int64_t most) {
    table.assign(1, chance(98) ? 0 : static_cast<int32_t>(below(9) - 4));
    for (int64_t c = 0; c < clients; ++c)
        table.push_back(table.back() + static_cast<int32_t>(chance(98) ? below(most) : below(9) - 8));
    return table.back() < 0 ? 0 : table.back();
}

static flora_clients make_clients(int64_t *M, int64_t *P, int64_t *flat) {
    int64_t count = below(5);
    *M = offsets(tokens, count, 30), *P = offsets(ranks, count, 20), *flat = 0;
    for (int64_t c = 0; c < count; ++c)
        *flat += static_cast<int64_t>(tokens[c + 1] - tokens[c]) * (ranks[c + 1] - ranks[c]);
    if (*flat < 0) *flat = 0;
    scaling.assign(count, 0.5), seeds.assign(count, static_cast<int64_t>(source()));
    rows.assign(count, chance(95) ? 7 : weird());
    q.assign(count, chance(95) ? 9000 : static_cast<int32_t>(weird()));
    flora_clients c = {};
    c.num_clients = chance(99) ? count : -1;
    c.token_offsets = chance(99) ? tokens.data() : nullptr, c.rank_offsets = chance(99) ? ranks.data() : nullptr;
    if (chance(50)) c.scaling = scaling.data();
    c.scaling_dtype = chance(98) ? FLORA_FP64 : 77;
    if (chance(50)) c.q = q.data(), c.seed = chance(98) ? seeds.data() : nullptr, c.first_row = rows.data();
    return c;
}

[[noreturn]] static void broken(const char *what, long call) {
    std::fprintf(stderr, "call %ld: %s (last error: %s)\n", call, what, flora_last_error());
    std::abort();
}

static bool meet(const Range &a, const Range &b) { return a.low < b.high && b.low < a.high; }

// Make the call that the arguments describe, if the library's own checks or the arena make it harmless.
template <class Ask, class Run>
static bool judge(long number, flora_exec given, Ask ask, Run run) {
    static std::vector<unsigned char> workspace;
    // Room behind, as a later version's struct would have, sometimes with something in it.
    static struct {
        flora_exec exec;
        char room[512];
    } longer;
    longer.exec = given, longer.room[8] = chance(50);
    flora_exec &exec = longer.exec;
    size_t bytes = 0;
    flora_status asked = ask(&exec, &bytes);
    if (asked == FLORA_OK && outside) return false;
    workspace.resize(bytes + 512);
    uintptr_t at = (reinterpret_cast<uintptr_t>(workspace.data()) + 255) / 256 * 256;
    exec.workspace = reinterpret_cast<void *>(at + (chance(1) ? 8 : 0));
    exec.workspace_bytes = bytes - (bytes && chance(2) ? 1 : 0);
    if (chance(1)) exec.workspace = nullptr;
    std::memcpy(before, arena, ARENA);
    flora_status status = run(&exec);
    if (asked != FLORA_OK && status != asked) broken("the call and its _workspace disagree", number);
    if (status != FLORA_OK && !*flora_last_error()) broken("refused without a reason", number);
    std::vector<Range> changed = status == FLORA_OK ? outputs : std::vector<Range>();
    for (int64_t i = 0; i < ARENA; ++i) {
        if (i % 4096 == 0 && !std::memcmp(arena + i, before + i, 4096)) i += 4096;
        if (i == ARENA || arena[i] == before[i]) continue;
        const char *byte = reinterpret_cast<const char *>(arena + i);
        bool allowed = false;
        for (const Range &range : changed) allowed = allowed || (byte >= range.low && byte < range.high);
        if (!allowed) broken(status == FLORA_OK ? "wrote beyond its outputs" : "was refused and wrote", number);
    }
    for (size_t i = 0; i < changed.size(); ++i)
        for (const Range &input : inputs)
            if (meet(changed[i], input)) broken("accepted an output that overlaps an input", number);
    return status == FLORA_OK;
}

static bool one_call(long number) {
    outputs.clear(), inputs.clear(), outside = false;
    flora_exec exec = FLORA_EXEC_INIT;
    exec.num_threads = static_cast<int32_t>(chance(97) ? 1 + below(2) : weird());
    exec.isa = chance(50) ? 1 : chance(95) ? 0 : static_cast<int32_t>(weird());
    exec.device = chance(99) ? FLORA_CPU : static_cast<int32_t>(weird());
    if (chance(1)) exec.struct_size = static_cast<size_t>(below(400));
    int64_t M, P, flat, K = below(70), N = below(50);
    int32_t dtype = any_float(), master = chance(50) ? dtype : FLORA_FP32;
    switch (below(5)) {
        case 0: {
            flora_merge_item item = FLORA_MERGE_ITEM_INIT;
            if (chance(40)) dtype = FLORA_BF16;
            P = below(40);
            item.coef = vector(P, any_float(), false);
            item.weight = matrix(N, K, dtype, true), item.A = matrix(P, K, any_float(), false);
            item.B = matrix(P, N, any_float(), false);
            if (chance(20)) item.low_bits = matrix(N, K, FLORA_INT16, true);
            flora_merge_options options = FLORA_MERGE_OPTIONS_INIT;
            options.rounding = static_cast<int32_t>(chance(70) ? 0 : chance(90) ? 1 : weird());
            options.accumulate = chance(50) ? FLORA_FP32 : chance(95) ? FLORA_FP64 : FLORA_BF16;
            return judge(
                number, exec, [&](auto *e, size_t *b) { return flora_merge_many_workspace(e, &item, 1, &options, b); },
                [&](auto *e) { return flora_merge(e, &item, &options); });
        }
        case 1: {
            flora_shrink_args args = FLORA_SHRINK_ARGS_INIT;
            args.clients = make_clients(&M, &P, &flat);
            args.s = vector(flat, dtype, true);
            args.x = matrix(M, K, dtype, false), args.A = matrix(P, K, master, false);
            return judge(
                number, exec, [&](auto *e, size_t *b) { return flora_shrink_workspace(e, &args, b); },
                [&](auto *e) { return flora_shrink(e, &args); });
        }
        case 2: {
            flora_expand_args args = FLORA_EXPAND_ARGS_INIT;
            args.clients = make_clients(&M, &P, &flat);
            args.s = vector(flat, dtype, false);
            args.y = matrix(M, N, dtype, true), args.B = matrix(P, N, master, false);
            return judge(
                number, exec, [&](auto *e, size_t *b) { return flora_expand_workspace(e, &args, b); },
                [&](auto *e) { return flora_expand(e, &args); });
        }
        case 3: {
            flora_wgrad_args args = FLORA_WGRAD_ARGS_INIT;
            args.clients = make_clients(&M, &P, &flat);
            args.s = vector(flat, dtype, false);
            args.ds = args.s;
            args.x = matrix(M, K, dtype, false), args.dy = matrix(M, N, dtype, false);
            args.dA = matrix(P, K, master, true), args.dB = matrix(P, N, master, true);
            return judge(
                number, exec, [&](auto *e, size_t *b) { return flora_wgrad_workspace(e, &args, b); },
                [&](auto *e) { return flora_wgrad(e, &args); });
        }
        default: {
            flora_adamw_args args = FLORA_ADAMW_ARGS_INIT;
            int32_t wide = chance(50) ? FLORA_FP32 : FLORA_FP64;
            int64_t count = below(4), size = 0;
            static std::vector<int64_t> table;
            static std::vector<int32_t> owner;
            table.assign(1, 0), owner.clear();
            for (int64_t i = 0; i < count; ++i) {
                table.push_back(size += chance(99) ? below(200) : -3);
                owner.push_back(static_cast<int32_t>(chance(99) ? below(3) : 9));
                if (size < 0 || size > 1000) size = 0;
            }
            flora_vector v[4];
            for (int i = 0; i < 4; ++i) v[i] = {place(size * 8), size, 1, wide, 0};
            for (int i = 0; i < 4; ++i) remember({v[i].data, 1, size, 0, 1, wide, 0}, i != 1);
            args.param = v[0].data, args.grad = v[1].data, args.exp_avg = v[2].data, args.exp_avg_sq = v[3].data;
            args.numel = chance(99) ? size : -size, args.dtype = chance(99) ? wide : FLORA_BF16;
            args.num_segments = chance(99) ? count : -1, args.segment_offsets = chance(99) ? table.data() : nullptr;
            args.owner = owner.data(), args.hyper = matrix(3, 7, chance(50) ? FLORA_FP32 : FLORA_FP64, false);
            return judge(
                number, exec, [&](auto *e, size_t *b) { return flora_adamw_workspace(e, &args, b); },
                [&](auto *e) { return flora_adamw(e, &args); });
        }
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return std::fprintf(stderr, "fuzz SEED CALLS\n"), 2;
    source.seed(std::strtoull(argv[1], nullptr, 10));
    long calls = std::strtol(argv[2], nullptr, 10), accepted = 0;
    for (int64_t i = 0; i < ARENA; ++i) arena[i] = static_cast<unsigned char>(source() % 64);
    for (long i = 0; i < calls; ++i) accepted += one_call(i);
    std::printf("%ld calls, %ld accepted\n", calls, accepted);
    return 0;
}
