// SPDX-License-Identifier: MIT
// Attention of a few flat rows: keys and values pass by as they stand, each read once. Every sum is
// taken in the order of attention_lanes.h. For pairs of bfloat16 only.
#pragma once

#include "attention.h"

namespace tokenspeed::cpu::TS_ISA {

template <typename KV>
class StreamWorker {
    using P = typename Operands<bf16, KV>::P;

  public:
    static bool serves(const AttentionParams& p) {
        return P::kPerWord == 2 && p.k_start == nullptr && p.q_tail_dim == 0 &&
               p.page_size % kLanes == 0 && p.q_dim % (2 * kLanes) == 0 &&
               p.value_dim % (2 * kLanes) == 0;
    }

    StreamWorker(const AttentionParams& p, const AttentionShape& s)
        : p_(p), s_(s), key_words_(s.key_dim / 2) {
        const int64_t rows = kStreamed;
        uint32_t* const memory =
            scratch_of<uint32_t>(0, rows * (key_words_ + kBlock + kBlock / 2 + 1));
        queries_ = memory;
        scores_ = reinterpret_cast<float*>(queries_ + rows * key_words_);
        weights_ = reinterpret_cast<uint32_t*>(scores_ + rows * kBlock);
        shrinks_ = reinterpret_cast<float*>(weights_ + rows * kBlock / 2);
    }

    // [rows]: a result, its largest score and its sum.
    static int64_t partial_floats(const AttentionParams& p) {
        return kStreamed * (p.value_dim + 2);
    }

    // What merge() and finish() need.
    void take(const Item& item) {
        item_ = item;
        rows_ = item.count <= 2 ? item.count : item.count <= 4 ? 4 : 8;
    }

    // `following`: the item that this worker's thread takes next, if it is known.
    void open(const Item& item, const Item* following) {
        take(item);
        following_ = following;
        for (int64_t i = 0; i < rows_; ++i) {
            const auto [token, head] = place_of(p_, s_, item, min_of<int64_t>(i, item.count - 1));
            const bf16* const q =
                static_cast<const bf16*>(p_.q) + token * p_.q_stride + head * p_.q_head_stride;
            __builtin_memcpy(queries_ + i * key_words_, q, static_cast<size_t>(s_.key_dim) * 2);
        }
    }

    void clear(float* partial) const {
        const int64_t rows = rows_;
        __builtin_memset(partial, 0, static_cast<size_t>(rows * (p_.value_dim + 2)) * 4);
        for (int64_t i = 0; i < rows; ++i) top_of(partial)[i] = -kInfinity;
    }

    void attend(int64_t span, float* partial) {
        clear(partial);
        const int64_t last = visible(p_, s_, item_.row, item_.first + item_.count - 1);
        const int64_t start = span * kSpan, count = min_of(last - start, kSpan);
        int64_t located = min_of(last - start, kSpan + kBlock);
        locate(p_, item_.row, start, located, keys_, values_);
        if (located <= kSpan && following_ != nullptr) located += locate_following(located);
        for (int64_t at = 0; at < count; at += kBlock) {
            const int64_t size = min_of(kBlock, count - at);
            with_rows([&](auto rows) {
                constexpr int kRows = decltype(rows)::value;
                ahead_of(values_ + at, size, item_.head * p_.value_head_stride, p_.value_dim);
                for (int64_t n = 0; n < size; n += kLanes) {
                    scores<kRows>(keys_[at + n], n, min_of<int64_t>(kLanes, size - n));
                }
                for (int i = 0; i < kRows; ++i) soften(i, start + at, size, partial);
                ahead_of(keys_ + at + size, min_of(kBlock, located - at - size),
                         item_.head * p_.key_head_stride, s_.key_dim);
                values<kRows>(values_ + at, size, partial);
            });
        }
    }

    void merge(float* total, const float* next) const {
        const int64_t rows = rows_;
        for (int64_t i = 0; i < rows; ++i) {
            const Vec old_top = splat(top_of(total)[i]), new_top = splat(top_of(next)[i]);
            const Vec top = max_of(old_top, new_top);
            const Vec keep = share(old_top, top), add = share(new_top, top);
            float* const out = total + i * p_.value_dim;
            const float* const more = next + i * p_.value_dim;
            for (int64_t n = 0; n < p_.value_dim; n += kLanes) {
                store(out + n, merged(load(out + n), keep, load(more + n), add));
            }
            top_of(total)[i] = top[0];
            float& sum = sum_of(total)[i];
            sum = merged(splat(sum), keep, splat(sum_of(next)[i]), add)[0];
        }
    }

    void finish(const float* total) const {
        for (int64_t i = 0; i < item_.count; ++i) {
            const auto [token, head] = place_of(p_, s_, item_, i);
            bf16* const out =
                static_cast<bf16*>(p_.out) + (token * p_.num_heads + head) * p_.value_dim;
            const Vec sum = splat(sum_of(total)[i]);
            const Vec scale = sum == 0.0f ? Vec{} : 1.0f / sum;
            for (int64_t n = 0; n < p_.value_dim; n += kLanes) {
                store(out + n, load(total + i * p_.value_dim + n) * scale);
            }
        }
    }

  private:
    float* top_of(float* partial) const { return partial + rows_ * p_.value_dim; }
    const float* top_of(const float* partial) const { return partial + rows_ * p_.value_dim; }
    float* sum_of(float* partial) const { return top_of(partial) + rows_; }
    const float* sum_of(const float* partial) const { return top_of(partial) + rows_; }

    // Puts the first block of the following item behind `located` keys; returns how many it has.
    int64_t locate_following(int64_t located) {
        const Item& next = *following_;
        const int64_t end = visible(p_, s_, next.row, next.first + next.count - 1);
        const int64_t start = Spans(p_, s_, next).first * kSpan;
        const int64_t count = min_of(kBlock, end - start);
        locate(p_, next.row, start, count, keys_ + located, values_ + located);
        const int64_t heads = next.head - item_.head;
        for (int64_t i = 0; i < count; ++i) keys_[located + i] += heads * p_.key_head_stride;
        return max_of<int64_t>(count, 0);
    }

    template <typename Body>
    void with_rows(const Body& body) {
        if (rows_ == 1) return body(std::integral_constant<int, 1>{});
        if (rows_ == 2) return body(std::integral_constant<int, 2>{});
        if (rows_ == 4) return body(std::integral_constant<int, 4>{});
        body(std::integral_constant<int, 8>{});
    }

    // Rows that stand scattered defeat the hardware's prefetching: values are asked for while keys
    // are multiplied, and the next block's keys while values are; a few at a time, since a core has
    // few requests in flight.
    void ahead_of(const KV* const* rows, int64_t count, int64_t offset, int64_t size) {
        ahead_ = rows;
        num_ahead_ = count;
        ahead_offset_ = offset;
        ahead_size_ = size;
    }
    void fetch(int64_t first, int64_t count) {
        const int64_t end = min_of(first + count, num_ahead_);
        for (int64_t i = first; i < end; ++i) prefetch(ahead_[i] + ahead_offset_, ahead_size_);
    }

    // Scores of one head's rows with the kLanes keys from n of a block on, which stand in one page
    // from `key` on. Those past `count` may hold anything: soften() hides their scores.
    template <int kRows>
    void scores(const KV* key, int64_t n, int64_t count) {
        key += item_.head * p_.key_head_stride;
        const int64_t ahead = div_ceil(kLanes * kLanes, key_words_);  // keys asked for in each turn
        Vec sums[kRows] = {};
        for (int64_t k = 0; k < key_words_; k += kLanes) {
            const int64_t asked = k / kLanes * ahead;
            fetch(n + asked, min_of(ahead, count - asked));
            VecU words[kLanes];
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
                words[i] = bit_cast<VecU>(halves(key + i * p_.key_stride, 2 * k, s_.key_dim));
            }
            transpose(words);
#pragma GCC unroll 16
            for (int i = 0; i < kLanes; ++i) {
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m) {
                    sums[m] = P::mac(sums[m], splat(queries_[m * key_words_ + k + i]), words[i]);
                }
            }
        }
        for (int m = 0; m < kRows; ++m) store(scores_ + m * kBlock + n, sums[m]);
    }

    void soften(int64_t i, int64_t start, int64_t count, float* partial) {
        float* const scores = scores_ + i * kBlock;
        bf16* const weights = reinterpret_cast<bf16*>(weights_ + i * (kBlock / 2));
        const int64_t row = min_of<int64_t>(i, item_.count - 1);
        const int64_t seen = visible(p_, s_, item_.row, item_.first + row);
        const int64_t limit = min_of(count, seen - start);
        const int64_t low = lowest_key(p_, seen) - start;
        const float factor = p_.scale * kLog2E;
        Vec largest = splat(-kInfinity);
        for (int64_t n = 0; n < count; n += kLanes) {
            Vec score = load(scores + n);
            if (n < low || n + kLanes > limit) {
                for (int64_t lane = 0; lane < kLanes; ++lane) {
                    if (n + lane < low || n + lane >= limit) score[lane] = -kInfinity;
                }
                store(scores + n, score);
            }
            largest = max_of(largest, score * factor);
        }
        const Vec old_top = splat(top_of(partial)[i]);
        const Vec top = splat(max_of(old_top[0], reduce_max(largest)));
        const float shrink = share(old_top, top)[0];
        const Vec shift = shift_of(top);
        for (int64_t n = 0; n < count; n += kLanes) {
            store(weights + n, exp2(load(scores + n) * factor - shift));
        }
        shrinks_[i] = shrink;
        top_of(partial)[i] = top[0];
        sum_of(partial)[i] *= shrink;
    }

    template <int kRows>
    void values(const KV* const* values, int64_t count, float* partial) {
        constexpr int kVecs = kRows == 8   ? 2
                              : kRows == 4 ? 4
                                           : 8;  // as many sums as registers hold
        int64_t n = 0;
        for (; n + kVecs * kLanes <= p_.value_dim; n += kVecs * kLanes) {
            few_values<kRows, kVecs>(values, count, n, partial);
        }
        for (; n < p_.value_dim; n += 2 * kLanes) few_values<kRows, 2>(values, count, n, partial);
    }

    // With the first features, the weights are summed too: by themselves they would be one chain.
    template <int kRows, int kVecs>
    void few_values(const KV* const* values, int64_t count, int64_t column, float* partial) {
        float* const out = partial + column;
        const int64_t offset = item_.head * p_.value_head_stride;
        Vec sums[kRows][kVecs], totals[kRows];
        for (int m = 0; m < kRows; ++m) {
            const float shrink = shrinks_[m];
            totals[m] = splat(sum_of(partial)[m]);
            for (int v = 0; v < kVecs; ++v) {
                sums[m][v] = load(out + m * p_.value_dim + v * kLanes) * shrink;
            }
        }
        for (int64_t k = 0; k < count; k += 2) {
            if (column == 0) {
                fetch(k, 2);
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m) {
                    const VecU weight = splat(weights_[m * (kBlock / 2) + k / 2]);
                    totals[m] = P::mac(totals[m], weight, one_words<P>());
                }
            }
            const KV* const even = values[k] + offset;
            const KV* const odd = k + 1 < count ? values[k + 1] + offset : nullptr;
#pragma GCC unroll 8
            for (int v = 0; v < kVecs; v += 2) {
                const VecHH a = halves(even, column + v * kLanes, p_.value_dim);
                const VecHH b =
                    odd != nullptr ? halves(odd, column + v * kLanes, p_.value_dim) : VecHH{};
                const VecU low = interleave<false>(a, b), high = interleave<true>(a, b);
#pragma GCC unroll 8
                for (int m = 0; m < kRows; ++m) {
                    const VecU weight = splat(weights_[m * (kBlock / 2) + k / 2]);
                    sums[m][v] = P::mac(sums[m][v], weight, low);
                    sums[m][v + 1] = P::mac(sums[m][v + 1], weight, high);
                }
            }
        }
        for (int m = 0; m < kRows; ++m) {
            if (column == 0) sum_of(partial)[m] = totals[m][0];
            for (int v = 0; v < kVecs; ++v) {
                store(out + m * p_.value_dim + v * kLanes, sums[m][v]);
            }
        }
    }

    // Features [at, at + 2 * kLanes) of a key or value of `size`, in bfloat16.
    static VecHH halves(const KV* row, int64_t at, int64_t size) {
        if constexpr (sizeof(KV) == 1) {
            float scale;
            __builtin_memcpy(&scale, row + size, sizeof(scale));
            const int8_t* const codes = reinterpret_cast<const int8_t*>(row) + at;
            return side_by_side(to_bf16(load_codes(codes) * scale),
                                to_bf16(load_codes(codes + kLanes) * scale));
        } else {
            return load_raw<VecHH>(row + at);
        }
    }

    const AttentionParams& p_;
    const AttentionShape& s_;
    const int64_t key_words_;
    Item item_{};
    const Item* following_ = nullptr;
    int64_t rows_ = 1;                  // of each head, those past item_.count repeat the last
    uint32_t* queries_;                 // [rows][key_words]
    float* scores_;                     // [rows][kBlock]
    uint32_t* weights_;                 // [rows][kBlock / 2]
    float* shrinks_;                    // [rows]
    const KV* const* ahead_ = nullptr;  // rows that come after those in work
    int64_t num_ahead_ = 0, ahead_offset_ = 0, ahead_size_ = 0;
    const KV* keys_[kSpan + kBlock];
    const KV* values_[kSpan + kBlock];
};

}  // namespace tokenspeed::cpu::TS_ISA
