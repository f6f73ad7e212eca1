// What is known about every two bytes of memory that a kernel may touch: who wrote and read them last, and when.
//
// Two accesses race when different threads make them, one of them writes, and no barrier lies between. Time is counted
// in epochs: a block's barrier starts a new one, so does a new block, and a warp's own synchronisation starts a new
// stamp for its lanes. Blocks of one launch are never ordered. Numbers only grow, so nothing is ever cleared.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace shim {

struct Who {
    uint32_t epoch, block_epoch, launch_epoch;  // now, and when this block and this launch began
    uint32_t stamp;                             // of the warp
    int thread;
};

struct Cell {
    uint32_t write_epoch = 0, write_stamp = 0, read_epoch = 0, read_stamp = 0;
    uint32_t many_epoch = 0;   // the last epoch in which several threads read
    uint32_t cross_epoch = 0;  // the last epoch in which a second block of a launch read
    int16_t writer = -1, reader = -1;
    bool pending = false;  // an asynchronous copy is on its way here
};

class Region {
  public:
    Region(const void* base, size_t bytes, std::string name, bool shared)
            : base_(reinterpret_cast<uintptr_t>(base)), bytes_(bytes), name_(std::move(name)), shared_(shared),
                cells_((bytes + 1) / 2) {}

    bool holds(const void* p, size_t bytes) const {
        auto at = reinterpret_cast<uintptr_t>(p);
        return at >= base_ && at + bytes <= base_ + bytes_;
    }
    const std::string& name() const { return name_; }
    uintptr_t base() const { return base_; }
    size_t offset(const void* p) const { return reinterpret_cast<uintptr_t>(p) - base_; }

    // Each returns what is wrong, or nullptr.
    const char* read(const void* p, size_t bytes, const Who& who) {
        for (Cell* cell = at(p); cell != at(p, bytes); ++cell) {
            if (cell->pending) return "reads what an asynchronous copy has not been waited for";
            if (shared_ && cell->write_epoch < who.block_epoch) return "reads what nobody has written";
            if (!ordered(who, cell->write_epoch, cell->write_stamp, cell->writer)) return "reads, without a barrier, what another thread wrote";
            note_read(*cell, who);
        }
        return nullptr;
    }
    const char* write(const void* p, size_t bytes, const Who& who, bool pending = false) {
        for (Cell* cell = at(p); cell != at(p, bytes); ++cell) {
            if (cell->pending) return "writes where an asynchronous copy is on its way";
            if (!ordered(who, cell->write_epoch, cell->write_stamp, cell->writer)) return "writes, without a barrier, what another thread wrote";
            bool crowded = cell->many_epoch == who.epoch || (!shared_ && cell->cross_epoch >= who.launch_epoch);
            if (crowded || !ordered(who, cell->read_epoch, cell->read_stamp, cell->reader)) return "writes, without a barrier, what another thread reads";
            cell->pending = pending;
            note_write(*cell, who);
        }
        return nullptr;
    }
    // A deferred copy lands: it counts as a write of the thread that waited.
    void land(const void* p, size_t bytes, const Who& who) {
        for (Cell* cell = at(p); cell != at(p, bytes); ++cell) {
            cell->pending = false;
            note_write(*cell, who);
        }
    }
    void forget_copies() {
        for (Cell& cell : cells_) cell.pending = false;
    }

  private:
    bool ordered(const Who& who, uint32_t epoch, uint32_t stamp, int thread) const {
        if (epoch >= who.block_epoch && epoch < who.epoch) return true;  // a barrier lies between
        if (epoch < who.launch_epoch) return true;                       // an earlier launch
        if (epoch < who.block_epoch) return shared_;                     // another block, with a memory of its own
        return thread == who.thread || (thread / 32 == who.thread / 32 && stamp != who.stamp);
    }
    Cell* at(const void* p) { return cells_.data() + offset(p) / 2; }
    Cell* at(const void* p, size_t bytes) { return cells_.data() + (offset(p) + bytes + 1) / 2; }
    static void note_write(Cell& cell, const Who& who) {
        cell.write_epoch = who.epoch, cell.write_stamp = who.stamp, cell.writer = int16_t(who.thread);
    }
    static void note_read(Cell& cell, const Who& who) {
        bool other = cell.reader != who.thread;
        if (cell.read_epoch == who.epoch && other && cell.read_stamp == who.stamp) cell.many_epoch = who.epoch;
        if (cell.read_epoch == who.epoch && other && cell.reader / 32 != who.thread / 32) cell.many_epoch = who.epoch;
        if (cell.read_epoch >= who.launch_epoch && cell.read_epoch < who.block_epoch) cell.cross_epoch = who.epoch;
        cell.read_epoch = who.epoch, cell.read_stamp = who.stamp, cell.reader = int16_t(who.thread);
    }

    uintptr_t base_;
    size_t bytes_;
    std::string name_;
    bool shared_;
    std::vector<Cell> cells_;
};

}  // namespace shim
