// SPDX-License-Identifier: MIT
// Causal attention over paged keys and values, online softmax (arXiv:2205.14135), for grouped-query
// and absorbed latent attention alike: query rows that share a key head are folded into the rows of
// one matrix product, so each page is read once for them.
//
//   row r of the batch, key head h:   flat query rows  f = token * group + head in group
//   an item:                          up to `max_rows` flat rows of one (r, h)
//   a span:                           kSpan keys, its own softmax; spans are merged in order
//   a block:                          kBlock keys, packed once for all rows of the item
//
// Blocks and spans begin at fixed positions of the sequence, and a flat row never looks at another:
// a result does not depend on the batch or on the number of threads. Nor on chunking in float32; in
// bfloat16 one or two flat rows of a key head sum in another order than more of them do.
#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int64_t kBlock = 64;
constexpr int64_t kSpan = 512;

struct Item {
    int32_t row;    // of the batch
    int32_t head;   // of the keys
    int32_t first;  // flat query row
    int32_t count;
};

struct Shape {
    int64_t group, key_dim, value_pad;  // value_pad: value_dim in whole panels
    int64_t max_rows;

    int64_t partial_floats() const { return max_rows * (value_pad + 2); }
};

// The unnormalised result of some keys: sum of p * value, largest score, sum of p; p = 2^(score -
// largest).
struct Partial {
    float* out;  // [count, value_pad]
    float* top;  // [count]
    float* sum;  // [count]

    Partial(float* memory, const Shape& s)
        : out(memory), top(memory + s.max_rows * s.value_pad), sum(top + s.max_rows) {}
};

int64_t query_len(const AttentionParams& p, int64_t row) {
    return p.q_start[row + 1] - p.q_start[row];
}

// Keys that a flat query row sees: those up to its own position.
int64_t visible(const AttentionParams& p, const Shape& s, const Item& item, int64_t flat) {
    return p.kv_len[item.row] - query_len(p, item.row) + flat / s.group + 1;
}

int64_t num_spans(const AttentionParams& p, const Shape& s, const Item& item) {
    return div_ceil(visible(p, s, item, item.first + item.count - 1), kSpan);
}

template <typename Q, typename KV>
class Worker {
    using P = Product<Q, KV>;
    using Element = typename P::Element;

  public:
    Worker(const AttentionParams& p, const Shape& s)
        : p_(p), s_(s), key_words_(div_ceil(s.key_dim, P::kPerWord)) {
        const int64_t words = s.max_rows * key_words_ + kBlock * key_words_ +
                              kBlock / P::kPerWord * s.value_pad +
                              s.max_rows * (kBlock + kBlock / P::kPerWord);
        uint32_t* memory = scratch_of<uint32_t>(0, words);
        const auto take = [&](int64_t count) {
            uint32_t* const taken = memory;
            memory += count;
            return taken;
        };
        key_panels_ = take(kBlock * key_words_);
        value_panels_ = take(kBlock / P::kPerWord * s.value_pad);
        scores_ = reinterpret_cast<float*>(take(s.max_rows * kBlock));
        weights_ = take(s.max_rows * kBlock / P::kPerWord);
        queries_ = take(s.max_rows * key_words_);
    }

    // Packs the item's queries; attend() then refers to it.
    void open(const Item& item) {
        item_ = item;
        few_ = P::kPerWord == 2 && query_len(p_, item.row) * s_.group <= 2 &&
               p_.page_size % kLanes == 0 && p_.value_dim % kPanel == 0;
        const int64_t stride = key_words_ * P::kPerWord;
        for (int64_t i = 0; i < item.count; ++i) {
            const int64_t flat = item.first + i;
            const int64_t token = p_.q_start[item.row] + flat / s_.group;
            const int64_t head = item.head * s_.group + flat % s_.group;
            Element* const to = reinterpret_cast<Element*>(queries_) + i * stride;
            copy_row(to,
                     static_cast<const Q*>(p_.q) + token * p_.q_stride + head * p_.q_head_stride,
                     p_.q_dim, stride);
            if (p_.q_tail_dim == 0) continue;
            copy_row(to + p_.q_dim,
                     static_cast<const Q*>(p_.q_tail) + token * p_.q_tail_stride +
                         head * p_.q_tail_head_stride,
                     p_.q_tail_dim, stride - p_.q_dim);
        }
    }

    // The item over the keys of one span.
    void attend(int64_t span, const Partial& result) {
        __builtin_memset(result.out, 0,
                         static_cast<size_t>(item_.count * s_.value_pad) * sizeof(float));
        for (int64_t i = 0; i < item_.count; ++i) {
            result.top[i] = -kInfinity;
            result.sum[i] = 0.0f;
        }
        const int64_t last = visible(p_, s_, item_, item_.first + item_.count - 1);
        const int64_t start = span * kSpan;
        const int64_t count = min_of(last - start, kSpan);
        locate(start, count);
        for (int64_t i = 0; i < count; i += kBlock) {
            block(start, i, min_of(kBlock, count - i), count, result);
        }
    }

  private:
    // The keys start + [at, at + count) of a span that has `of` keys. Rows scattered over pages
    // defeat the hardware's prefetching: values are fetched while keys are multiplied, and the next
    // block's keys while values are.
    void block(int64_t start, int64_t at, int64_t count, int64_t of, const Partial& result) {
        const KV* const* const keys = keys_ + at;
        const KV* const* const values = values_ + at;
        fetch_ = p_.values != p_.keys ? values : nullptr;
        fetch_count_ = count;
        fetch_size_ = p_.value_dim;
        if (few_) {
            few_scores(keys, count);
        } else {
            panel_scores(keys, count);
        }
        for (int64_t i = 0; i < item_.count; ++i) soften(i, start + at, count, result);
        fetch_ = keys + kBlock;
        fetch_count_ = of - at - kBlock;
        fetch_size_ = s_.key_dim;
        if (few_) {
            few_values(values, count, result);
        } else {
            panel_values(values, count, result);
        }
    }

    // Asks for rows [first, first + count) of what is needed after the rows in work: a few at a
    // time, since a core has few requests in flight.
    void fetch(int64_t first, int64_t count) {
        if (fetch_ == nullptr) return;
        const int64_t end = min_of(first + count, fetch_count_);
        for (int64_t i = first; i < end; ++i) prefetch(fetch_[i], fetch_size_);
    }

    void panel_scores(const KV* const* keys, int64_t count) {
        for (int64_t lane = 0; lane < div_ceil(count, kPanel) * kPanel; lane += kLanes) {
            const int64_t lanes = min_of<int64_t>(kLanes, max_of<int64_t>(0, count - lane));
            pack_lanes<P, KV>([&](int64_t i) { return keys[lane + i]; }, lanes, s_.key_dim,
                              key_panels_ + lane / kPanel * kPanel * key_words_, lane % kPanel);
            fetch(lane, lanes);
        }
        for (int64_t n = 0; n < count; n += kPanel) {
            panel_product<P>(item_.count, queries_, key_words_, key_panels_ + n * key_words_,
                             key_words_, scores_ + n, kBlock, false);
        }
    }

    void panel_values(const KV* const* values, int64_t count, const Partial& result) {
        const int64_t value_words = div_ceil(count, P::kPerWord);
        const int64_t panel_words = kBlock / P::kPerWord * kPanel;
        for (int64_t k = 0; k < value_words; ++k) {
            const int64_t first = k * P::kPerWord, odd = first + 1;
            pack_depth<P>(values[first], P::kPerWord == 2 && odd < count ? values[odd] : nullptr,
                          p_.value_dim, value_panels_ + k * kPanel, panel_words);
            fetch(first, P::kPerWord);
        }
        for (int64_t n = 0; n < s_.value_pad; n += kPanel) {
            panel_product<P>(item_.count, weights_, kBlock / P::kPerWord,
                             value_panels_ + n / kPanel * panel_words, value_words, result.out + n,
                             s_.value_pad, true);
        }
    }

    // For one or two query rows packing costs more than it saves: keys and values are multiplied as
    // they stand. Sums differ in their last bits, so this is for pairs of bfloat16 only, and
    // depends on the row of the batch alone.
    void few_scores(const KV* const* keys, int64_t count) {
        if constexpr (P::kPerWord == 2) {
            if (item_.count == 1) {
                few_scores<1>(keys, count);
            } else {
                few_scores<2>(keys, count);
            }
        }
    }
    template <int kM>
    void few_scores(const KV* const* keys, int64_t count) {
        constexpr int kN = kLanes / kM;  // keys that one reduction finishes; they stand in one page
        const Element* const q = reinterpret_cast<const Element*>(queries_);
        const int64_t q_stride = key_words_ * P::kPerWord;
        int64_t n = 0;
        for (; n + kN <= count; n += kN) {
            fetch(n, kN);
            dot_tile<P, kM, kN, false>(
                q, q_stride, keys[n], p_.key_stride, s_.key_dim,
                [&](int i, int j, float sum) { scores_[i * kBlock + n + j] = sum; });
        }
        for (; n < count; ++n) {
            dot_tile<P, kM, 1, false>(
                q, q_stride, keys[n], p_.key_stride, s_.key_dim,
                [&](int i, int, float sum) { scores_[i * kBlock + n] = sum; });
        }
    }

    void few_values(const KV* const* values, int64_t count, const Partial& result) {
        if constexpr (P::kPerWord == 2) {
            for (int64_t n = 0; n < p_.value_dim; n += kPanel) {
                if (item_.count == 1) {
                    few_values<1>(values, count, n, result);
                } else {
                    few_values<2>(values, count, n, result);
                }
            }
        }
    }
    template <int kM>
    void few_values(const KV* const* values, int64_t count, int64_t column, const Partial& result) {
        static_assert(kPanelVecs % 2 == 0);
        Vec sums[kM][kPanelVecs];
        float* const out = result.out + column;
        for (int m = 0; m < kM; ++m) {
            for (int v = 0; v < kPanelVecs; ++v) {
                sums[m][v] = load(out + m * s_.value_pad + v * kLanes);
            }
        }
        for (int64_t k = 0; k < count; k += 2) {
            if (column == 0) fetch(k, 2);
            const KV* const even = values[k] + column;
            const KV* const odd = k + 1 < count ? values[k + 1] + column : nullptr;
#pragma GCC unroll 4
            for (int v = 0; v < kPanelVecs; v += 2) {
                const VecHH a = load_raw<VecHH>(even + v * kLanes);
                const VecHH b = odd != nullptr ? load_raw<VecHH>(odd + v * kLanes) : VecHH{};
                const VecU low = interleave<false>(a, b), high = interleave<true>(a, b);
#pragma GCC unroll 2
                for (int m = 0; m < kM; ++m) {
                    const VecU weight =
                        splat(load_raw<uint32_t>(weights_ + (m * kBlock + k) / P::kPerWord));
                    sums[m][v] = P::mac(sums[m][v], weight, low);
                    sums[m][v + 1] = P::mac(sums[m][v + 1], weight, high);
                }
            }
        }
        for (int m = 0; m < kM; ++m) {
            for (int v = 0; v < kPanelVecs; ++v) {
                store(out + m * s_.value_pad + v * kLanes, sums[m][v]);
            }
        }
    }

    // Where the keys and values of a span stand.
    void locate(int64_t start, int64_t count) {
        const int32_t* const pages = p_.page_table + p_.slots[item_.row] * p_.max_pages;
        const KV* const keys = static_cast<const KV*>(p_.keys) + item_.head * s_.key_dim;
        const KV* const values = static_cast<const KV*>(p_.values) + item_.head * p_.value_dim;
        int64_t page = start / p_.page_size, offset = start % p_.page_size;
        for (int64_t i = 0; i < count; ++page, offset = 0) {
            const int64_t token = pages[page] * p_.page_size + offset;
            const KV* key = keys + token * p_.key_stride;
            const KV* value = values + token * p_.value_stride;
            const int64_t end = min_of(count, i + p_.page_size - offset);
            for (; i < end; ++i, key += p_.key_stride, value += p_.value_stride) {
                keys_[i] = key;
                values_[i] = value;
            }
        }
    }

    // Scores of one flat row -> weights, after bringing its result to the new largest score.
    void soften(int64_t i, int64_t start, int64_t count, const Partial& result) {
        float* const scores = scores_ + i * kBlock;
        Element* const weights = reinterpret_cast<Element*>(weights_) + i * kBlock;
        const int64_t seen =
            min_of(count, visible(p_, s_, item_, item_.first + i) - start);  // may be negative
        if (seen <= 0) {
            __builtin_memset(static_cast<void*>(weights), 0, kBlock * sizeof(Element));
            return;
        }
        const float factor = p_.scale * kLog2E;
        Vec top = splat(-kInfinity);
        for (int64_t n = 0; n < kBlock; n += kLanes) {
            Vec score = splat(-kInfinity);
            if (n + kLanes <= seen) {
                score = load(scores + n) * factor;
            } else if (n < seen) {
                score = load(scores + n) * factor;
                for (int64_t lane = seen - n; lane < kLanes; ++lane) score[lane] = -kInfinity;
            }
            store(scores + n, score);
            top = max_of(top, score);
        }
        const float old_top = result.top[i];
        const float new_top = max_of(old_top, reduce_max(top));
        Vec sum{};
        for (int64_t n = 0; n < kBlock; n += kLanes) {
            const Vec weight = exp2(load(scores + n) - new_top);
            sum += weight;
            store(weights + n, weight);
        }
        const float shrink = old_top == new_top ? 1.0f : exp2(splat(old_top - new_top))[0];
        result.top[i] = new_top;
        result.sum[i] = result.sum[i] * shrink + reduce_add(sum);
        if (shrink == 1.0f) return;
        float* const out = result.out + i * s_.value_pad;
        for (int64_t n = 0; n < s_.value_pad; n += kLanes) store(out + n, load(out + n) * shrink);
    }

    const AttentionParams& p_;
    const Shape& s_;
    const int64_t key_words_;
    Item item_{};
    bool few_ = false;
    uint32_t* queries_;                 // [count, key_words]
    uint32_t* key_panels_;              // [kBlock / kPanel] panels of key_words
    uint32_t* value_panels_;            // [value_pad / kPanel] panels of kBlock / kPerWord
    float* scores_;                     // [count, kBlock]
    uint32_t* weights_;                 // [count, kBlock] elements
    const KV* const* fetch_ = nullptr;  // rows to ask for, while others are multiplied
    int64_t fetch_count_ = 0, fetch_size_ = 0;
    const KV* keys_[kSpan];
    const KV* values_[kSpan];
};

// total <- total and the span after it.
void merge(const Shape& s, int64_t count, const Partial& total, const Partial& next) {
    for (int64_t i = 0; i < count; ++i) {
        if (next.sum[i] == 0.0f) continue;  // the row sees none of the span's keys
        const float top = max_of(total.top[i], next.top[i]);
        const float keep = exp2(splat(total.top[i] - top))[0];
        const float add = exp2(splat(next.top[i] - top))[0];
        float* const out = total.out + i * s.value_pad;
        const float* const more = next.out + i * s.value_pad;
        for (int64_t n = 0; n < s.value_pad; n += kLanes) {
            store(out + n, load(out + n) * keep + load(more + n) * add);
        }
        total.top[i] = top;
        total.sum[i] = total.sum[i] * keep + next.sum[i] * add;
    }
}

template <typename Q>
void finish(const AttentionParams& p, const Shape& s, const Item& item, const Partial& total) {
    for (int64_t i = 0; i < item.count; ++i) {
        const int64_t flat = item.first + i;
        const int64_t token = p.q_start[item.row] + flat / s.group;
        const int64_t head = item.head * s.group + flat % s.group;
        Q* const out = static_cast<Q*>(p.out) + (token * p.num_heads + head) * p.value_dim;
        const float scale = 1.0f / total.sum[i];
        for (int64_t n = 0; n < p.value_dim; n += kLanes) {
            store_at(out, n, p.value_dim, load(total.out + i * s.value_pad + n) * scale);
        }
    }
}

int64_t count_items(const AttentionParams& p, const Shape& s) {
    int64_t items = 0;
    for (int64_t r = 0; r < p.num_rows; ++r) {
        items += div_ceil(query_len(p, r) * s.group, s.max_rows) * p.num_kv_heads;
    }
    return items;
}

int64_t count_spans(const AttentionParams& p) {
    int64_t longest = 1;
    for (int64_t r = 0; r < p.num_rows; ++r)
        longest = max_of(longest, div_ceil(p.kv_len[r], kSpan));
    return longest;
}

// The longest work first: later rows of a prompt see more keys.
void list_items(const AttentionParams& p, const Shape& s, Item* items) {
    for (int64_t r = 0; r < p.num_rows; ++r) {
        const int64_t flats = query_len(p, r) * s.group;
        for (int64_t block = div_ceil(flats, s.max_rows) - 1; block >= 0; --block) {
            const int64_t first = block * s.max_rows;
            for (int64_t head = 0; head < p.num_kv_heads; ++head) {
                *items++ = {static_cast<int32_t>(r), static_cast<int32_t>(head),
                            static_cast<int32_t>(first),
                            static_cast<int32_t>(min_of(s.max_rows, flats - first))};
            }
        }
    }
}

template <typename Q, typename KV>
void whole_items(const AttentionParams& p, const Shape& s, const Item* items, int64_t num_items) {
    parallel_for(num_items, 1, [&](int64_t begin, int64_t end) {
        float* const memory = scratch_of<float>(1, 2 * s.partial_floats());
        const Partial total(memory, s), next(memory + s.partial_floats(), s);
        Worker<Q, KV> worker(p, s);
        for (int64_t i = begin; i < end; ++i) {
            worker.open(items[i]);
            worker.attend(0, total);
            for (int64_t span = 1; span < num_spans(p, s, items[i]); ++span) {
                worker.attend(span, next);
                merge(s, items[i].count, total, next);
            }
            finish<Q>(p, s, items[i], total);
        }
    });
}

// As whole_items, with every span a task of its own.
template <typename Q, typename KV>
void split_items(const AttentionParams& p, const Shape& s, const Item* items, int64_t num_items,
                 int64_t max_spans) {
    float* const memory = scratch_of<float>(3, num_items * max_spans * s.partial_floats());
    const auto partial = [&](int64_t item, int64_t span) {
        return Partial(memory + (item * max_spans + span) * s.partial_floats(), s);
    };
    parallel_for(num_items * max_spans, 1, [&](int64_t begin, int64_t end) {
        Worker<Q, KV> worker(p, s);
        for (int64_t task = begin; task < end; ++task) {
            const int64_t item = task / max_spans, span = task % max_spans;
            if (span >= num_spans(p, s, items[item])) continue;
            worker.open(items[item]);
            worker.attend(span, partial(item, span));
        }
    });
    parallel_for(num_items, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            for (int64_t span = 1; span < num_spans(p, s, items[i]); ++span) {
                merge(s, items[i].count, partial(i, 0), partial(i, span));
            }
            finish<Q>(p, s, items[i], partial(i, 0));
        }
    });
}

}  // namespace

void attention(const AttentionParams& p) {
    Shape s{};
    s.group = p.num_heads / p.num_kv_heads;
    s.key_dim = p.q_dim + p.q_tail_dim;
    s.value_pad = div_ceil(p.value_dim, kPanel) * kPanel;
    // Few items: smaller ones, and then single spans, so that every thread has work.
    const int64_t enough = 2 * num_threads();
    const int64_t spans = count_spans(p);
    s.max_rows = s.key_dim > 256 ? 64 : 96;
    while (s.max_rows > 8 && count_items(p, s) * spans < enough) s.max_rows /= 2;
    const int64_t num_items = count_items(p, s);
    Item* const items = scratch_of<Item>(2, num_items);
    list_items(p, s, items);
    with_type(p.dtype, [&](auto q) {
        with_type(p.kv_dtype, [&](auto kv) {
            using Q = decltype(q);
            using KV = decltype(kv);
            if (num_items < enough && spans > 1) {
                split_items<Q, KV>(p, s, items, num_items, spans);
            } else {
                whole_items<Q, KV>(p, s, items, num_items);
            }
        });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
