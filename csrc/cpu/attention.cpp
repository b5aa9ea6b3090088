// SPDX-License-Identifier: MIT
// Causal attention over keys and values in pages or in line, for grouped-query and latent attention
// alike: query rows that share a key head are folded into one item, so each key is read once for
// them. Cuts a batch into items and divides them among threads; attention.h says what they are.
#include "attention_lanes.h"
#include "attention_stream.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int64_t kSpansAhead = 32;  // for each thread, before they are merged

int64_t items_of(const AttentionParams& p, const AttentionShape& s, int64_t row) {
    return div_ceil(p.query_len(row) * s.group, s.max_rows) * p.num_kv_heads;
}

int64_t count_items(const AttentionParams& p, const AttentionShape& s) {
    int64_t items = 0;
    for (int64_t r = 0; r < p.num_rows; ++r) items += items_of(p, s, r);
    return items;
}

int64_t count_spans(const AttentionParams& p) {
    int64_t longest = 1;
    for (int64_t r = 0; r < p.num_rows; ++r) {
        const int64_t length = p.kv_len_of(r);
        const int64_t seen = p.window > 0 ? p.window + p.query_len(r) + kSpan : length;
        longest = max_of(longest, div_ceil(min_of(length, seen), kSpan));
    }
    return longest;
}

// The longest work first: later rows of a prompt see more keys.
Item* list_row(const AttentionParams& p, const AttentionShape& s, int64_t row, Item* items) {
    const int64_t flats = p.query_len(row) * s.group;
    for (int64_t block = div_ceil(flats, s.max_rows) - 1; block >= 0; --block) {
        const int64_t first = block * s.max_rows;
        for (int64_t head = 0; head < p.num_kv_heads; ++head) {
            *items++ = {static_cast<int32_t>(row), static_cast<int32_t>(head),
                        static_cast<int32_t>(first),
                        static_cast<int32_t>(min_of(s.max_rows, flats - first)),
                        s.streams && flats <= kStreamed};
        }
    }
    return items;
}

template <typename Worker>
void whole_item(Worker& worker, const AttentionParams& p, const AttentionShape& s, const Item& item,
                const Item* following, float* total, float* next) {
    worker.open(item, following);
    const Spans spans(p, s, item);
    if (spans.first == spans.last) worker.clear(total);
    for (int64_t span = spans.first; span < spans.last; ++span) {
        if (span == spans.first) {
            worker.attend(span, total);
            continue;
        }
        worker.attend(span, next);
        worker.merge(total, next);
    }
    worker.finish(total);
}

// Calls body(worker) with a worker that suits the item.
template <typename Q, typename KV, typename Body>
void with_worker(const AttentionParams& p, const AttentionShape& s, const Item& item,
                 const Body& body) {
    if constexpr (kHasPairs && sizeof(Q) == 2 && sizeof(KV) <= 2) {
        if (item.streamed) {
            StreamWorker<KV> worker(p, s);
            return body(worker);
        }
    }
    LaneWorker<Q, KV> worker(p, s);
    body(worker);
}

// Short streamed items in a row, so that a thread knows what it reads next; others one by one, so
// that threads end together.
int64_t items_at_once(const AttentionShape& s, int64_t num_items, int64_t spans) {
    constexpr int64_t kSpansAtOnce = 8;
    if (!s.all_stream) return 1;
    const int64_t most = num_items / (2 * num_threads());
    return max_of<int64_t>(1, min_of(kSpansAtOnce / spans, most));
}

template <typename Q, typename KV>
void whole_items(const AttentionParams& p, const AttentionShape& s, const Item* items,
                 int64_t num_items, int64_t spans) {
    const int64_t at_once = items_at_once(s, num_items, spans);
    parallel_for(num_items, at_once, [&](int64_t begin, int64_t end) {
        float* const memory = scratch_of<float>(1, 2 * s.partial_floats);
        for (int64_t i = begin; i < end; ++i) {
            const Item* const following = i + 1 < end ? items + i + 1 : nullptr;
            with_worker<Q, KV>(p, s, items[i], [&](auto& worker) {
                whole_item(worker, p, s, items[i], following, memory, memory + s.partial_floats);
            });
        }
    });
}

// As whole_items, with every span a task of its own. Spans are merged in order, some of all items
// at a time, so that their results take no more memory than threads need.
template <typename Q, typename KV>
void split_items(const AttentionParams& p, const AttentionShape& s, const Item* items,
                 int64_t num_items, int64_t max_spans) {
    const int64_t width = min_of(max_spans, div_ceil(kSpansAhead * num_threads(), num_items));
    float* const memory = scratch_of<float>(3, num_items * (width + 1) * s.partial_floats);
    const auto partial = [&](int64_t item, int64_t i) {  // 0: the total
        return memory + (item * (width + 1) + i) * s.partial_floats;
    };
    for (int64_t first = 0; first < max_spans; first += width) {
        parallel_for(num_items * width, 1, [&](int64_t begin, int64_t end) {
            for (int64_t task = begin; task < end; ++task) {
                const int64_t item = task / width, place = first + task % width;
                const Spans spans(p, s, items[item]);
                if (place > 0 && spans.first + place >= spans.last) continue;
                with_worker<Q, KV>(p, s, items[item], [&](auto& worker) {
                    worker.open(items[item], nullptr);
                    float* const out = partial(item, place == 0 ? 0 : place - first + 1);
                    if (spans.first + place < spans.last) {
                        worker.attend(spans.first + place, out);
                    } else {
                        worker.clear(out);
                    }
                });
            }
        });
        parallel_for(num_items, 1, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                const Spans spans(p, s, items[i]);
                const int64_t last = min_of(spans.last - spans.first, first + width);
                with_worker<Q, KV>(p, s, items[i], [&](auto& worker) {
                    worker.take(items[i]);
                    for (int64_t place = max_of<int64_t>(first, 1); place < last; ++place) {
                        worker.merge(partial(i, 0), partial(i, place - first + 1));
                    }
                    if (first + width >= max_spans) worker.finish(partial(i, 0));
                });
            }
        });
    }
}

// Few items: smaller ones, and then single spans, so that every thread has work.
template <typename Q, typename KV>
void attend(const AttentionParams& p, AttentionShape& s) {
    const int64_t enough = 2 * num_threads();
    const int64_t spans = count_spans(p);
    int64_t longest = 1;
    for (int64_t r = 0; r < p.num_rows; ++r) longest = max_of(longest, p.query_len(r) * s.group);
    s.max_rows = min_of(3 * kPitch, div_ceil(longest, kLanes) * kLanes);
    while (s.max_rows > kLanes && count_items(p, s) * spans < 4 * enough) {
        s.max_rows = max_of<int64_t>(kLanes, s.max_rows / 2);
    }
    s.partial_floats = LaneWorker<Q, KV>::partial_floats(p, s);
    if constexpr (kHasPairs && sizeof(Q) == 2 && sizeof(KV) <= 2) {
        s.streams = StreamWorker<KV>::serves(p);
        const int64_t streamed = s.streams ? StreamWorker<KV>::partial_floats(p) : 0;
        s.all_stream = s.streams && longest <= kStreamed;
        s.partial_floats = s.all_stream ? streamed : max_of(s.partial_floats, streamed);
    }
    const int64_t num_items = count_items(p, s);
    if (num_items == 0) return;
    Item* const items = scratch_of<Item>(2, num_items);
    Item* last = items;
    for (int64_t r = 0; r < p.num_rows; ++r) last = list_row(p, s, r, last);
    if (num_items < enough && spans > 1) {
        split_items<Q, KV>(p, s, items, num_items, spans);
    } else {
        whole_items<Q, KV>(p, s, items, num_items, spans);
    }
}

}  // namespace

void attention(const AttentionParams& p) {
    AttentionShape s{};
    s.group = p.num_heads / p.num_kv_heads;
    s.key_dim = p.q_dim + p.q_tail_dim;
    with_type(p.dtype, [&](auto q) {
        using Q = decltype(q);
        if (p.kv_dtype == DType::kInt8Row) return attend<Q, Int8Row>(p, s);
        with_type(p.kv_dtype, [&](auto kv) { attend<Q, decltype(kv)>(p, s); });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
