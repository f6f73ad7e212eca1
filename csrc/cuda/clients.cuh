// Which client a block works for. Every client has whole tiles of its own, so its bits do not depend on who else is
// there; the tables lie on the device and are searched there, so nothing is read back.
#pragma once

#include "tile.cuh"

namespace flora::cuda {

struct Clients {
    const int32_t *tokens, *ranks;  // offsets, count + 1 each
    const void *scaling;
    const int32_t *q;
    const int64_t *seed, *first_row;
    int32_t count, scaling_dtype;
};

// A tile of BLOCK tokens of one client.
struct Place {
    int client, first, stop, row;  // the client's tokens, and the tile's first
    int bank, rank;
    int64_t s_start, part;  // where its S starts, and how many rows of parts the clients before it have
    bool found;
};

FLORA_DEVICE uint64_t sum_of_lanes(uint64_t value) {
    for (int distance = 1; distance < 32; distance *= 2) {
        int source = thread_id() % 32 ^ distance;
        uint32_t low = shuffle(uint32_t(value), source), high = shuffle(uint32_t(value >> 32), source);
        value += uint64_t(high) << 32 | low;
    }
    return value;
}

// Each lane looks at one client of 32, so a warp finds its place in count / 32 rounds. A client has ceil(m / block)
// tiles, and at least `at_least`; one with several of them leaves a part of its rank's rows for each.
FLORA_DEVICE Place find_place(const Clients &clients, int tile, int block, int at_least) {
    int lane = thread_id() % 32, before = 0, skipped = 0;
    uint64_t s_size = 0, parts = 0, tiles_before = 0;
    for (int first = 0; first < clients.count; first += 32) {
        int client = first + lane, tiles = 0, tokens = 0, rank = 0;
        if (client < clients.count) {
            tokens = ld_global(clients.tokens + client + 1) - ld_global(clients.tokens + client);
            rank = ld_global(clients.ranks + client + 1) - ld_global(clients.ranks + client);
            tiles = (tokens + block - 1) / block;
            tiles = tiles > at_least ? tiles : at_least;
        }
        int through = tiles;  // tiles up to and with this lane's client
        for (int distance = 1; distance < 32; distance *= 2) {
            int other = int(shuffle(uint32_t(through), lane - distance));
            if (lane >= distance) through += other;
        }
        if (client < clients.count && skipped + through <= tile) {
            ++before, tiles_before += uint64_t(tiles);
            s_size += uint64_t(tokens) * uint64_t(rank);
            if (tiles > 1) parts += uint64_t(tiles) * uint64_t(rank);
        }
        int all = int(shuffle(uint32_t(through), 31));
        if (skipped + all > tile) break;
        skipped += all;
    }
    Place place{};
    place.client = int(sum_of_lanes(uint64_t(before)));
    place.s_start = int64_t(sum_of_lanes(s_size));
    place.part = int64_t(sum_of_lanes(parts));
    int own_tile = tile - int(sum_of_lanes(tiles_before));
    place.found = place.client < clients.count;
    if (!place.found) return place;
    place.first = ld_global(clients.tokens + place.client);
    place.stop = ld_global(clients.tokens + place.client + 1);
    place.row = place.first + own_tile * block;
    place.bank = ld_global(clients.ranks + place.client);
    place.rank = ld_global(clients.ranks + place.client + 1) - place.bank;
    return place;
}

// A client's mask: which elements of its X are kept.
struct Mask {
    uint64_t seed;
    uint32_t first_row, q;  // q = 0: everything is kept

    FLORA_DEVICE bool on() const { return q != 0; }
    // 1 / (1 - p), rounded once; a client that keeps nothing gets 0, not infinity.
    template <class Sum>
    FLORA_DEVICE Sum scale() const {
        return q == 0 ? Sum(1) : q < 65536 ? divide(Sum(65536), Sum(65536 - q)) : Sum(0);
    }
    FLORA_DEVICE Draws draws(int row, int column) const { return draws_of(uint32_t(column) / 8, first_row + uint32_t(row), seed, 0); }
};
FLORA_DEVICE Mask mask_of(const Clients &clients, int client) {
    if (!clients.q) return {};
    uint64_t first_row = clients.first_row ? uint64_t(ld_global(clients.first_row + client)) : 0;
    return {uint64_t(ld_global(clients.seed + client)), uint32_t(first_row), uint32_t(ld_global(clients.q + client))};
}

FLORA_DEVICE double scaling_of(const Clients &clients, int client) {
    return clients.scaling ? number_at<double>(clients.scaling, client, clients.scaling_dtype) : 1.0;
}

// Zero what the mask drops, in a tile that has arrived; `row` and `column` are its first in the client's X.
template <int ROWS, int COLUMNS, int LD, int THREADS, class T>
FLORA_DEVICE void drop(T *tile, const Mask &mask, int row, int column) {
    for (int index = thread_id(); index < ROWS * COLUMNS / 8; index += THREADS) {
        int i = index / (COLUMNS / 8), j = index % (COLUMNS / 8) * 8;
        auto *eight = reinterpret_cast<Pack<T, 8> *>(tile + i * LD + j);
        Draws draws = mask.draws(row + i, column + j);
        Pack<T, 8> values = ld_shared(eight);
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e)
            if (draws[e] < mask.q) values.v[e] = T{};
        st_shared(eight, values);
    }
}

// A tile of factors as the compute dtype sees it.
template <int ROWS, int COLUMNS, int LD_FROM, int LD_TO, int THREADS, class T, class F>
FLORA_DEVICE void compute_copy(T *to, const F *from) {
    for (int index = thread_id(); index < ROWS * COLUMNS / 8; index += THREADS) {
        int i = index / (COLUMNS / 8), j = index % (COLUMNS / 8) * 8;
        Pack<F, 8> values = ld_shared(reinterpret_cast<const Pack<F, 8> *>(from + i * LD_FROM + j));
        Pack<T, 8> copy;
        FLORA_UNROLL
        for (int e = 0; e < 8; ++e) narrow(widen(values.v[e]), copy.v[e]);
        st_shared(reinterpret_cast<Pack<T, 8> *>(to + i * LD_TO + j), copy);
    }
}

template <class T>
constexpr bool kSixteen = sizeof(T) == 2;

}  // namespace flora::cuda
