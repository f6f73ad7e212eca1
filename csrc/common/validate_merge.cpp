// Checks of a merge: each item by itself, then that nothing written shares memory with anything else.
#include <algorithm>

#include "checks.h"

namespace flora {

namespace {

enum Field { WEIGHT, LOW_BITS, A, B, COEF, FIELDS };
const char *const FIELD_NAMES[] = {"weight", "low_bits", "A", "B", "coef"};

struct Spans {
    Span of[FIELDS];
};

// What an item is called in messages: one alone needs no number.
int64_t label(int64_t i, int64_t count) { return count > 1 ? i : -1; }

flora_status check_item(const flora_merge_item &item, int64_t i, const flora_merge_options &options, Spans *spans) {
    const flora_matrix &W = item.weight;
    *spans = {};
    FLORA_TRY(check_matrix({FIELD_NAMES[WEIGHT], i}, W, FLOATS, -1, -1, true, &spans->of[WEIGHT]));
    FLORA_TRY(check_matrix({FIELD_NAMES[A], i}, item.A, FLOATS, -1, W.columns, false, &spans->of[A]));
    FLORA_TRY(check_matrix({FIELD_NAMES[B], i}, item.B, FLOATS, item.A.rows, W.rows, false, &spans->of[B]));
    FLORA_TRY(check_vector({FIELD_NAMES[COEF], i}, item.coef, FLOATS, item.A.rows, false, &spans->of[COEF]));
    Name weight = {FIELD_NAMES[WEIGHT], i};
    if (options.rounding == FLORA_STOCHASTIC && W.dtype != FLORA_BF16)
        return fail(FLORA_BAD_ARGUMENT, "%s.dtype must be bf16 for stochastic rounding, got %s", weight.c_str(),
                    dtype_name(W.dtype));
    if (!item.low_bits.data) return FLORA_OK;
    FLORA_TRY(check_matrix({FIELD_NAMES[LOW_BITS], i}, item.low_bits, code(FLORA_INT16), W.rows, W.columns, true,
                           &spans->of[LOW_BITS]));
    if (W.dtype != FLORA_BF16)
        return fail(FLORA_BAD_ARGUMENT, "%s.dtype must be bf16 where there are low_bits, got %s", weight.c_str(),
                    dtype_name(W.dtype));
    if (options.rounding != FLORA_NEAREST)
        return fail(FLORA_BAD_ARGUMENT, "options.rounding must be FLORA_NEAREST with low_bits, which loses nothing");
    return FLORA_OK;
}

// Some items' outputs in the order of their addresses: what meets one is found by bisection, so that a thousand items
// cost microseconds, without memory of our own.
class Outputs {
public:
    static constexpr int64_t ITEMS = 128;

    void add(int64_t item, Field field, const Span &span) {
        if (span.low < span.high) entries_[count_++] = {span, item, field, 0};
    }

    void sort() {
        std::sort(entries_, entries_ + count_, [](const Entry &a, const Entry &b) { return a.span.low < b.span.low; });
        uintptr_t reach = 0;
        for (int i = 0; i < count_; ++i) entries_[i].reach = reach = std::max(reach, entries_[i].span.high);
    }

    flora_status check(const Span &span, int64_t item, int field, int64_t items) const {
        if (span.low >= span.high) return FLORA_OK;
        const Entry *at = std::lower_bound(entries_, entries_ + count_, span.high,
                                           [](const Entry &entry, uintptr_t high) { return entry.span.low < high; });
        while (at-- != entries_ && at->reach > span.low) {
            if (at->item == item && at->field == field) continue;
            Name output = {FIELD_NAMES[at->field], label(at->item, items)};
            FLORA_TRY(check_apart(output, at->span, {FIELD_NAMES[field], label(item, items)}, span));
        }
        return FLORA_OK;
    }

private:
    struct Entry {
        Span span;
        int64_t item;
        Field field;
        uintptr_t reach;  // the highest end up to here
    };
    Entry entries_[2 * ITEMS];
    int count_ = 0;
};

flora_status check_options(const flora_merge_options *options) {
    FLORA_TRY(check_struct("options", options, sizeof(flora_merge_options)));
    if (options->rounding != FLORA_NEAREST && options->rounding != FLORA_STOCHASTIC)
        return fail(FLORA_BAD_ARGUMENT, "options.rounding must be FLORA_NEAREST or FLORA_STOCHASTIC, got %d",
                    options->rounding);
    if (options->accumulate != FLORA_FP32 && options->accumulate != FLORA_FP64)
        return fail(FLORA_BAD_ARGUMENT, "options.accumulate must be FLORA_FP32 or FLORA_FP64, got %d",
                    options->accumulate);
    return FLORA_OK;
}

}  // namespace

flora_status check_merge(const flora_merge_item *items, int64_t count, const flora_merge_options *options) {
    FLORA_TRY(check_options(options));
    if (count < 0 || (count > 0 && !items))
        return fail(FLORA_BAD_ARGUMENT, "items must point to num_items items, got %p and %lld",
                    static_cast<const void *>(items), wide(count));
    MergeItems all = {items, count};
    for (int64_t i = 0; i < count; ++i) {
        FLORA_TRY(check_struct("items[i]", &all[i], sizeof(flora_merge_item)));
        if (all[i].struct_size != items->struct_size)
            return fail(FLORA_BAD_ARGUMENT, "items[%lld].struct_size must be that of items[0], %zu, got %zu",
                        wide(i), items->struct_size, all[i].struct_size);
        Spans spans;
        FLORA_TRY(check_item(all[i], label(i, count), *options, &spans));
    }
    return FLORA_OK;
}

flora_status check_merge_overlaps(const MergeItems &items, const flora_merge_options &options) {
    for (int64_t start = 0; start < items.count; start += Outputs::ITEMS) {
        Outputs outputs;
        Spans spans;
        for (int64_t i = start; i < std::min(items.count, start + Outputs::ITEMS); ++i) {
            FLORA_TRY(check_item(items[i], label(i, items.count), options, &spans));
            outputs.add(i, WEIGHT, spans.of[WEIGHT]);
            outputs.add(i, LOW_BITS, spans.of[LOW_BITS]);
        }
        outputs.sort();
        for (int64_t i = 0; i < items.count; ++i) {
            FLORA_TRY(check_item(items[i], label(i, items.count), options, &spans));
            for (int field = 0; field < FIELDS; ++field)
                FLORA_TRY(outputs.check(spans.of[field], i, field, items.count));
        }
    }
    return FLORA_OK;
}

flora_status check_merge_workspace(const flora_exec &exec, const MergeItems &items,
                                   const flora_merge_options &options) {
    const Span workspace = workspace_span(exec);
    for (int64_t i = 0; i < items.count; ++i) {
        Spans spans;
        FLORA_TRY(check_item(items[i], label(i, items.count), options, &spans));
        for (int field = 0; field < FIELDS; ++field)
            FLORA_TRY(check_apart({"exec.workspace"}, workspace, {FIELD_NAMES[field], label(i, items.count)},
                                  spans.of[field]));
    }
    return FLORA_OK;
}

}  // namespace flora
