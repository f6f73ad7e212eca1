// Runs a kernel on the host: blocks one after another, a block's threads as fibers, warp instructions as meetings.
//
// A fiber runs until it meets others: at a barrier, or at an instruction of its whole warp. The last one to come to a
// warp instruction carries it out for all 32. Whatever is wrong ends the launch with a message; nothing throws.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "fibers.h"
#include "shadow.h"

namespace shim {

struct Dim3 {
    unsigned x, y, z;
    Dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// A copy that was asked for and is carried out only when it is waited for: as late as the hardware may be.
struct Copy {
    void* to;
    const void* from;
    int unit, bytes, filling;  // what the rest of the unit becomes: zero
    int group;
};

enum class State { ready, at_barrier, in_warp, done };

struct Fiber {
    Context context;
    std::unique_ptr<char[]> stack;
    State state = State::ready;
    const char* file = "";
    int line = 0;
    void* operands = nullptr;
    std::vector<Copy> copies;
    int groups = 0;
};

constexpr size_t kStackBytes = 96 * 1024;

class Machine {
  public:
    // Set from outside.
    int order = 0;                // of threads and blocks: 0 forward, 1 reverse, else the seed of a shuffle
    std::string fault, fault_at;  // see faulty()
    std::vector<std::unique_ptr<Region>> buffers;
    std::map<std::string, long> sites;  // every place met, with how often

    // Of the launch that runs.
    std::string error;
    Dim3 grid, block, block_id;
    int thread = 0;
    bool running = false;

    char* shared() { return shared_.get(); }

    bool launch(Dim3 blocks, Dim3 threads, size_t shared_bytes, const std::function<void()>& kernel) {
        if (!error.empty()) return false;
        grid = blocks, block = threads, kernel_ = &kernel;
        int count = int(threads.x * threads.y * threads.z);
        if (count % 32 || count > 1024 || count == 0) return fail_outside("a block has %d threads, no multiple of 32 up to 1024", count);
        if (blocks.y > 65535 || blocks.z > 65535 || blocks.x > 2147483647u || !blocks.x || !blocks.y || !blocks.z) return fail_outside("the grid is %u x %u x %u", blocks.x, blocks.y, blocks.z);
        if (shared_bytes > 232448) return fail_outside("%zu bytes of shared memory, a block gets 232448", shared_bytes);
        prepare(count, shared_bytes);
        launch_epoch_ = ++epoch_;
        running = true;
        for (long index : ordered(long(blocks.x) * blocks.y * blocks.z)) {
            block_id = Dim3(unsigned(index % blocks.x), unsigned(index / blocks.x % blocks.y), unsigned(index / blocks.x / blocks.y));
            if (!run_block(shared_bytes)) break;
        }
        running = false;
        ++epoch_;
        return error.empty();
    }

    // Called by fibers.

    [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
        char text[512];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        char place[128];
        snprintf(place, sizeof place, " (block %u,%u thread %d)", block_id.x, block_id.y, thread);
        error = std::string(text) + place;
        if (running) Context::swap(fibers_[thread].context, scheduler_);  // and never come back
    }

    void barrier(const char* file, int line) {
        if (faulty("skip", "barrier", file, line)) return;
        Fiber& self = fibers_[thread];
        self.state = State::at_barrier, self.file = file, self.line = line;
        Context::swap(self.context, scheduler_);
    }

    // Meet the 31 others; the last to come runs `act` over everybody's operands.
    template <class Operands, class Act>
    void meet(Operands& mine, const char* file, int line, Act act) {
        Fiber& self = fibers_[thread];
        self.operands = &mine, self.file = file, self.line = line, self.state = State::in_warp;
        int first = thread / 32 * 32;
        for (int lane = 0; lane < 32; ++lane) {
            Fiber& other = fibers_[first + lane];
            if (other.state != State::in_warp) return Context::swap(self.context, scheduler_);
            if (other.line != line || strcmp(other.file, file) != 0) return fail("a warp diverges: lane %d is at %s:%d, another at %s:%d", lane, base(other.file), other.line, base(file), line);
        }
        Operands* all[32];
        for (int lane = 0; lane < 32; ++lane) {
            all[lane] = static_cast<Operands*>(fibers_[first + lane].operands);
            fibers_[first + lane].state = State::ready;
        }
        act(all);
    }

    void next_stamp() { stamps_[thread / 32] = ++stamp_; }

    // Whether the fault that was asked for is planted here; an empty place means everywhere.
    bool faulty(const char* name, const char* kind, const char* file, int line) {
        std::string place = std::string(kind) + " " + base(file) + ":" + std::to_string(line);
        ++sites[place];
        return fault == name && (fault_at == place || fault_at == kind);
    }

    void check(const char* what, const char* verb, const void* p, size_t bytes, bool write) {
        if (reinterpret_cast<uintptr_t>(p) % std::min<size_t>(bytes, 16)) fail("%s %s %zu bytes at an address that is not aligned to them", what, verb, bytes);
        Region* region = find(p, bytes, what[0] == 's');
        if (!region) return fail("%s %s %zu bytes outside of every buffer", what, verb, bytes);
        if (const char* wrong = write ? region->write(p, bytes, who()) : region->read(p, bytes, who())) blame(*region, p, wrong);
    }

    void copy_async(void* to, const void* from, int unit, int bytes, int filling) {
        if (bytes < 0 || bytes > unit) fail("cp.async of %d bytes out of %d", bytes, unit);
        if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % unsigned(unit)) fail("cp.async between addresses that are not aligned to %d bytes", unit);
        if (bytes) {
            Region* source = find(from, size_t(bytes), false);
            if (!source) return fail("cp.async reads %d bytes outside of every buffer", bytes);
            if (const char* wrong = source->read(from, size_t(bytes), who())) blame(*source, from, wrong);
        }
        Region* region = find(to, size_t(unit), true);
        if (!region) return fail("cp.async writes outside of shared memory");
        if (const char* wrong = region->write(to, size_t(unit), who(), true)) blame(*region, to, wrong);
        fibers_[thread].copies.push_back({to, from, unit, bytes, filling, fibers_[thread].groups});
    }
    void commit() { ++fibers_[thread].groups; }
    // Carry out this thread's copies, but for those of the last `left` groups.
    void wait(int left) {
        Fiber& self = fibers_[thread];
        size_t kept = 0;
        for (const Copy& copy : self.copies) {
            if (copy.group >= self.groups - left) {
                self.copies[kept++] = copy;
                continue;
            }
            memset(copy.to, copy.filling, size_t(copy.unit));
            if (copy.bytes) memcpy(copy.to, copy.from, size_t(copy.bytes));
            shared_region_->land(copy.to, size_t(copy.unit), who());
        }
        self.copies.resize(kept);
    }

    static const char* base(const char* path) {
        const char* slash = strrchr(path, '/');
        return slash ? slash + 1 : path;
    }

  private:
    Who who() const { return {epoch_, block_epoch_, launch_epoch_, stamps_[size_t(thread) / 32], thread}; }

    Region* find(const void* p, size_t bytes, bool in_shared) {
        if (in_shared) return shared_region_ && shared_region_->holds(p, bytes) ? shared_region_.get() : nullptr;
        for (size_t i = 0; i < buffers.size(); ++i) {
            if (!buffers[i]->holds(p, bytes)) continue;
            if (i) std::swap(buffers[i], buffers[i - 1]);  // often asked for, early found
            return buffers[i ? i - 1 : 0].get();
        }
        return nullptr;
    }
    void blame(const Region& region, const void* p, const char* wrong) {
        const Fiber& self = fibers_[thread];
        fail("%s at byte %zu %s; last met at %s:%d", region.name().c_str(), region.offset(p), wrong, base(self.file), self.line);
    }
    bool fail_outside(const char* format, ...) {
        char text[256];
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        error = text;
        return false;
    }

    void prepare(int count, size_t shared_bytes) {
        if (fibers_.size() < size_t(count)) fibers_.resize(count);
        count_ = count;
        for (int i = 0; i < count; ++i) {
            if (!fibers_[i].stack) fibers_[i].stack.reset(new char[kStackBytes]);
        }
        stamps_.assign(size_t(count) / 32, 0);
        shared_owner_.reset(new char[shared_bytes + 128]);
        auto start = (reinterpret_cast<uintptr_t>(shared_owner_.get()) + 127) & ~uintptr_t{127};
        shared_.release();
        shared_.reset(reinterpret_cast<char*>(start));
        shared_region_ = std::make_unique<Region>(shared_.get(), shared_bytes, "shared memory", true);
    }

    std::vector<long> ordered(long count) const {
        std::vector<long> indices(count);
        std::iota(indices.begin(), indices.end(), 0L);
        if (order == 1) std::reverse(indices.begin(), indices.end());
        if (order > 1) std::shuffle(indices.begin(), indices.end(), std::mt19937(unsigned(order)));
        return indices;
    }

    bool run_block(size_t shared_bytes) {
        block_epoch_ = ++epoch_;
        memset(shared_.get(), 0xFF, shared_bytes);  // NaN in every format
        shared_region_->forget_copies();
        for (int i = 0; i < count_; ++i) {
            Fiber& fiber = fibers_[i];
            fiber.state = State::ready, fiber.copies.clear(), fiber.groups = 0, fiber.file = "", fiber.line = 0;
            fiber.context.start(fiber.stack.get(), kStackBytes, &Machine::enter);
        }
        std::vector<long> turns = ordered(count_);
        while (error.empty()) {
            bool moved = false;
            for (long turn : turns) {
                if (fibers_[turn].state != State::ready) continue;
                thread = int(turn), moved = true;
                Context::swap(scheduler_, fibers_[turn].context);
                if (!error.empty()) return false;
            }
            if (moved) continue;
            if (all_done()) return copies_waited_for();
            if (!open_barrier()) return false;
        }
        return false;
    }

    bool all_done() const {
        return std::all_of(fibers_.begin(), fibers_.begin() + count_, [](const Fiber& f) { return f.state == State::done; });
    }
    bool copies_waited_for() {
        for (int i = 0; i < count_; ++i) {
            for (const Copy& copy : fibers_[i].copies) {
                if (copy.bytes) return fail_outside("thread %d ends with an asynchronous copy that it never waited for", i);
            }
        }
        return true;
    }
    // All are stuck: at one and the same barrier, or for ever.
    bool open_barrier() {
        const Fiber& first = fibers_[0];
        for (int i = 0; i < count_; ++i) {
            const Fiber& fiber = fibers_[i];
            if (fiber.state == State::at_barrier && first.state == State::at_barrier && fiber.line == first.line && !strcmp(fiber.file, first.file)) continue;
            return fail_outside("the block hangs: thread 0 %s at %s:%d, thread %d %s at %s:%d", name(first.state), base(first.file), first.line, i, name(fiber.state), base(fiber.file), fiber.line);
        }
        ++epoch_;
        for (int i = 0; i < count_; ++i) fibers_[i].state = State::ready;
        return true;
    }
    static const char* name(State state) {
        return state == State::at_barrier ? "waits" : state == State::in_warp ? "waits for its warp" : "has ended, last met";
    }

    static void enter();

    const std::function<void()>* kernel_ = nullptr;
    Context scheduler_;
    std::vector<Fiber> fibers_;
    std::vector<uint32_t> stamps_;
    int count_ = 0;
    uint32_t epoch_ = 1, block_epoch_ = 1, launch_epoch_ = 1, stamp_ = 0;
    struct NoDelete { void operator()(char*) const {} };
    std::unique_ptr<char[]> shared_owner_;
    std::unique_ptr<char, NoDelete> shared_;
    std::unique_ptr<Region> shared_region_;
};

inline Machine& machine() {
    static Machine instance;
    return instance;
}

inline void Machine::enter() {
    Machine& self = machine();
    (*self.kernel_)();
    Fiber& fiber = self.fibers_[self.thread];
    fiber.state = State::done;
    Context::swap(fiber.context, self.scheduler_);
}

}  // namespace shim
