// SPDX-License-Identifier: MIT
// Attention of many flat rows of one key head, and of few where attention_stream.h does not serve:
// rows stand in the lanes of vectors, keys and values are broadcast. Scores, weights and results
// are held by lane, so that softmax takes no step across lanes; keys are multiplied as they stand
// in the cache, values once they are paired.
#pragma once

#include "attention.h"

namespace tokenspeed::cpu::TS_ISA {

#if defined(TS_ISA_avx512) || defined(TS_ISA_avx512bf16) || defined(TS_ISA_neon)
inline constexpr int kPitchVecs = 4;  // vectors of lanes in a panel of flat rows
#else
inline constexpr int kPitchVecs = 2;
#endif
inline constexpr int64_t kPitch = kPitchVecs * kLanes;

// Sums of a tile: rows of keys or of features, times vectors of lanes.
template <int kVecs>
inline constexpr int kTile = kPitchVecs == 4 ? (kVecs == 1   ? 16
                                                : kVecs == 4 ? 4
                                                             : 8)
                                             : (kVecs == 1 ? 8 : 4);

// c[m][lane] (+)= sum over k of word(m, k) * b[k][lane], m < kTile<kVecs>. b, c: kPitch apart.
template <class P, int kVecs, typename Word>
inline void lane_tile(const Word& word, const uint32_t* b, int64_t words, float* c,
                      bool accumulate) {
    constexpr int kRows = kTile<kVecs>;
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
            sums[m][v] = accumulate ? load(c + m * kPitch + v * kLanes) : Vec{};
        }
    }
    for (int64_t k = 0; k < words; ++k) {
        VecU right[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) right[v] = load_raw<VecU>(b + k * kPitch + v * kLanes);
#pragma GCC unroll 16
        for (int m = 0; m < kRows; ++m) {
            const VecU left = splat(word(m, k));
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sums[m][v] = P::mac(sums[m][v], left, right[v]);
        }
    }
#pragma GCC unroll 16
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(c + m * kPitch + v * kLanes, sums[m][v]);
    }
}

// Calls body(std::integral_constant<int, n>) for n = vecs.
template <typename Body>
inline void with_vecs(int64_t vecs, const Body& body) {
    if (vecs == 1) return body(std::integral_constant<int, 1>{});
    if (vecs == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (kPitchVecs == 4) {
        if (vecs == 3) return body(std::integral_constant<int, 3>{});
        body(std::integral_constant<int, 4>{});
    }
}

template <typename Q, typename KV>
class LaneWorker {
    using P = typename Operands<Q, KV>::P;
    using Element = typename P::Element;
    static constexpr int64_t kPerWord = P::kPerWord;

  public:
    LaneWorker(const AttentionParams& p, const AttentionShape& s)
        : p_(p),
          s_(s),
          key_words_(div_ceil(s.key_dim, kPerWord)),
          value_rows_(div_ceil(p.value_dim, 16) * 16),
          value_pitch_(div_ceil(value_rows_, kPanel) * kPanel),
          panels_(div_ceil(s.max_rows, kPitch)),
          latent_(p.values == p.keys),
          // Copied rows a power of two apart would share a few sets of the first cache.
          row_words_(div_ceil(key_words_, kLanes) * kLanes + 16) {
        const int64_t limits = panels_ * kPitch;
        const int64_t words = panels_ * key_words_ * kPitch + kBlock * row_words_ +
                              kBlock / kPerWord * value_pitch_ + kBlock * kPitch +
                              kBlock / kPerWord * kPitch + 2 * limits + 2 * value_pitch_;
        uint32_t* memory = scratch_of<uint32_t>(0, words + 16);
        const auto take = [&](int64_t count) {
            uint32_t* const taken = memory;
            memory += count;
            return taken;
        };
        queries_ = take(panels_ * key_words_ * kPitch);
        scores_ = reinterpret_cast<float*>(take(kBlock * kPitch));
        weights_ = take(kBlock / kPerWord * kPitch);
        values_words_ = take(kBlock / kPerWord * value_pitch_);
        copied_ = take(kBlock * row_words_);
        limits_ = reinterpret_cast<int32_t*>(take(limits));
        lows_ = reinterpret_cast<int32_t*>(take(limits));
        value_pair_ = reinterpret_cast<Element*>(take(2 * value_pitch_));
    }

    // [panels][value_rows + 2][kPitch]: results by feature, then largest scores and sums.
    static int64_t partial_floats(const AttentionParams& p, const AttentionShape& s) {
        return div_ceil(s.max_rows, kPitch) * (div_ceil(p.value_dim, 16) * 16 + 2) * kPitch;
    }

    // What merge() and finish() need.
    void take(const Item& item) { item_ = item; }

    // Packs the item's queries; attend() then refers to it.
    void open(const Item& item, const Item* /*following*/) {
        take(item);
        for (int64_t i = 0; i < div_ceil(item.count, kPitch) * kPitch; ++i) {
            const int64_t flat = item.first + min_of<int64_t>(i, item.count - 1);
            const int64_t seen = visible(p_, s_, item.row, flat);
            limits_[i] = static_cast<int32_t>(seen);
            lows_[i] = static_cast<int32_t>(lowest_key(p_, seen));
        }
        Element* const line = reinterpret_cast<Element*>(copied_);
        const int64_t stride = row_words_ * kPerWord;
        for (int64_t i = 0; i < item.count; i += kLanes) {
            const int64_t lanes = min_of<int64_t>(kLanes, item.count - i);
            for (int64_t lane = 0; lane < lanes; ++lane) query(i + lane, line + lane * stride);
            put_lanes(lanes, i);
        }
    }

    void clear(float* partial) const {
        for (int64_t panel = 0; panel * kPitch < item_.count; ++panel) {
            clear_panel(panel_of(partial, panel));
        }
    }

    // The item over the keys of one span. Overwrites `partial`.
    void attend(int64_t span, float* partial) {
        const int64_t last = visible(p_, s_, item_.row, item_.first + item_.count - 1);
        const int64_t start = span * kSpan, count = min_of(last - start, kSpan);
        const int64_t located = min_of(last - start, kSpan + kBlock);
        locate(p_, item_.row, start, located, keys_, values_);
        for (int64_t at = 0; at < count; at += kBlock) {
            const int64_t size = min_of(kBlock, count - at);
            next_keys_ = keys_ + at + size;
            next_values_ = values_ + at + size;
            num_next_ = min_of(kBlock, located - at - size);
            block(start + at, keys_ + at, values_ + at, size, at == 0, partial);
        }
    }

    // total <- total and the span after it.
    void merge(float* total, const float* next) const {
        for (int64_t panel = 0; panel * kPitch < item_.count; ++panel) {
            float* const a = panel_of(total, panel);
            const float* const b = panel_of(next, panel);
            const int64_t lanes = min_of(item_.count - panel * kPitch, kPitch);
            for (int64_t lane = 0; lane < lanes; lane += kLanes) merge_lanes(a + lane, b + lane);
        }
    }

    void finish(const float* total) const {
        for (int64_t i = 0; i < item_.count; i += kLanes) {
            const float* const from = panel_of(total, i / kPitch) + i % kPitch;
            const Vec top = load(from + value_rows_ * kPitch);
            const Vec sum = load(from + (value_rows_ + 1) * kPitch);
            const Vec scale = sum == 0.0f ? Vec{} : 1.0f / sum;
            const int64_t lanes = min_of<int64_t>(kLanes, item_.count - i);
            for (int64_t n = 0; n < p_.value_dim; n += kLanes) {
                VecU rows[kLanes];
                for (int j = 0; j < kLanes; ++j) {
                    const bool there = n + j < value_rows_;
                    rows[j] =
                        there ? bit_cast<VecU>(load(from + (n + j) * kPitch) * scale) : VecU{};
                }
                transpose(rows);
                for (int64_t lane = 0; lane < lanes; ++lane) {
                    store_at(out_row(i + lane), n, p_.value_dim, bit_cast<Vec>(rows[lane]));
                }
            }
            if (p_.lse == nullptr) continue;
            const Vec lse = sum > 0.0f ? top * kLn2 + log(sum) : splat(-kInfinity);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const auto [token, head] = place_of(p_, s_, item_, i + lane);
                p_.lse[token * p_.num_heads + head] =
                    sum[lane] != sum[lane] ? sum[lane] : lse[lane];
            }
        }
    }

  private:
    float* panel_of(float* partial, int64_t panel) const {
        return partial + panel * (value_rows_ + 2) * kPitch;
    }
    const float* panel_of(const float* partial, int64_t panel) const {
        return partial + panel * (value_rows_ + 2) * kPitch;
    }

    void clear_panel(float* out) const {
        __builtin_memset(out, 0, static_cast<size_t>((value_rows_ + 2) * kPitch) * 4);
        float* const top = out + value_rows_ * kPitch;
        for (int64_t lane = 0; lane < kPitch; ++lane) top[lane] = -kInfinity;
    }

    int64_t key_offset() const { return item_.head * p_.key_head_stride; }

    Q* out_row(int64_t i) const {
        const auto [token, head] = place_of(p_, s_, item_, i);
        return static_cast<Q*>(p_.out) + (token * p_.num_heads + head) * p_.value_dim;
    }

    // Flat row i of the item as elements, its parts one after the other.
    void query(int64_t i, Element* to) const {
        const auto [token, head] = place_of(p_, s_, item_, i);
        const int64_t padded = key_words_ * kPerWord;
        const Q* const q = static_cast<const Q*>(p_.q);
        copy_row(to, q + token * p_.q_stride + head * p_.q_head_stride, p_.q_dim, padded);
        if (p_.q_tail_dim == 0) return;
        const Q* const tail = static_cast<const Q*>(p_.q_tail);
        copy_row(to + p_.q_dim, tail + token * p_.q_tail_stride + head * p_.q_tail_head_stride,
                 p_.q_tail_dim, padded - p_.q_dim);
    }

    // The first `lanes` lines of copied_ become the lanes from flat row i on.
    void put_lanes(int64_t lanes, int64_t i) {
        uint32_t* const to = queries_ + i / kPitch * key_words_ * kPitch + i % kPitch;
        for (int64_t k = 0; k < key_words_; k += kLanes) {
            VecU rows[kLanes];
            for (int lane = 0; lane < kLanes; ++lane) {
                rows[lane] =
                    lane < lanes ? load_raw<VecU>(copied_ + lane * row_words_ + k) : VecU{};
            }
            transpose(rows);
            for (int64_t j = 0; j < min_of<int64_t>(kLanes, key_words_ - k); ++j) {
                __builtin_memcpy(to + (k + j) * kPitch, &rows[j], sizeof(VecU));
            }
        }
    }

    // `fresh`: nothing stands in `partial` yet.
    void block(int64_t start, const KV* const* keys, const KV* const* values, int64_t count,
               bool fresh, float* partial) {
        const uint32_t* rows[kBlock];
        place_keys(start, keys, count, rows);
        pack_values(values, count);
        for (int64_t panel = 0; panel * kPitch < item_.count; ++panel) {
            const int64_t first = panel * kPitch, left = item_.count - first;
            if (!sees(first, min_of(left, kPitch), start, count)) {
                if (fresh) clear_panel(panel_of(partial, panel));
                continue;
            }
            with_vecs(div_ceil(min_of(left, kPitch), kLanes), [&](auto vecs) {
                attend_panel<decltype(vecs)::value>(panel, start, rows, count, fresh,
                                                    panel_of(partial, panel));
            });
        }
    }

    // Rows scattered over pages defeat the hardware's prefetching: asks for those of the next block
    // while this one is packed and multiplied, a few at a time.
    void fetch(const KV* const* rows, int64_t offset, int64_t size, int64_t first,
               int64_t count) const {
        const int64_t end = min_of(first + count, num_next_);
        for (int64_t i = first; i < end; ++i) prefetch(rows[i] + offset, size);
    }

    // Rows past the last key repeat it: their weights are 0.
    void place_keys(int64_t start, const KV* const* keys, int64_t count, const uint32_t** rows) {
        bool as_they_stand = false;
        if constexpr (sizeof(KV) == sizeof(Element)) {
            as_they_stand = p_.k_start == nullptr && s_.key_dim % kPerWord == 0;
        }
        const int64_t offset = key_offset();
        const int64_t size = p_.k_tail != nullptr ? p_.q_dim : s_.key_dim;
        for (int64_t i = 0; i < count; ++i) {
            if (as_they_stand) {
                rows[i] = reinterpret_cast<const uint32_t*>(keys[i] + offset);
                continue;
            }
            uint32_t* const copy = copied_ + i * row_words_;
            Element* const to = reinterpret_cast<Element*>(copy);
            fetch_row(to, keys[i] + offset, size, key_words_ * kPerWord);
            if (p_.k_tail != nullptr) {
                const int64_t token = p_.k_start[item_.row] + start + i;
                const KV* const tail = static_cast<const KV*>(p_.k_tail) + token * p_.k_tail_stride;
                fetch_row(to + size, tail, p_.q_tail_dim, key_words_ * kPerWord - size);
            }
            rows[i] = copy;
        }
        for (int64_t i = count; i < kBlock; ++i) rows[i] = rows[count - 1];
    }

    void pack_values(const KV* const* values, int64_t count) {
        const int64_t offset = item_.head * p_.value_head_stride;
        for (int64_t k = 0; k < count; k += kPerWord) {
            if (!latent_) fetch(next_keys_, key_offset(), s_.key_dim, k, kPerWord);
            uint32_t* const to = values_words_ + k / kPerWord * value_pitch_;
            const KV* const even = values[k] + offset;
            const KV* const odd = kPerWord == 2 && k + 1 < count ? values[k + 1] + offset : nullptr;
            if constexpr (sizeof(KV) == 1) {
                fetch_row(value_pair_, even, p_.value_dim, p_.value_dim);
                Element* const second = value_pair_ + value_pitch_;
                if (odd != nullptr) fetch_row(second, odd, p_.value_dim, p_.value_dim);
                pack_depth<P>(value_pair_, odd != nullptr ? second : nullptr, p_.value_dim, to,
                              kPanel);
            } else {
                pack_depth<P>(even, odd, p_.value_dim, to, kPanel);
            }
        }
    }

    template <int kVecs>
    void attend_panel(int64_t panel, int64_t start, const uint32_t* const* rows, int64_t count,
                      bool fresh, float* out) {
        constexpr int kRows = kTile<kVecs>;
        const uint32_t* const queries = queries_ + panel * key_words_ * kPitch;
        for (int64_t n = 0; n < count; n += kRows) {
            if (panel == 0 && !latent_) {
                fetch(next_values_, item_.head * p_.value_head_stride, p_.value_dim, n, kRows);
            }
            const uint32_t* tile[kRows];
            for (int m = 0; m < kRows; ++m) tile[m] = rows[n + m];
            lane_tile<P, kVecs>([&](int m, int64_t k) { return load_raw<uint32_t>(tile[m] + k); },
                                queries, key_words_, scores_ + n * kPitch, false);
        }
        Vec shrink[kVecs];
        hide(panel * kPitch, kVecs * kLanes, start, count);
        const bool moved = soften(count, fresh, out + value_rows_ * kPitch, shrink) && !fresh;
        const int64_t words = div_ceil(count, kPerWord);
        for (int64_t n = 0; n < value_rows_; n += kRows) {
            float* const c = out + n * kPitch;
            for (int m = 0; m < kRows && moved; ++m) {
                for (int v = 0; v < kVecs; ++v) {
                    float* const at = c + m * kPitch + v * kLanes;
                    store(at, load(at) * shrink[v]);
                }
            }
            if (panel == 0 && latent_) {  // large rows, and this takes longest
                const int64_t at = n * kBlock / value_rows_;
                const int64_t end = (n + kRows) * kBlock / value_rows_;
                fetch(next_keys_, key_offset(), s_.key_dim, at, end - at);
            }
            const uint32_t* const from = values_words_ + n;
            lane_tile<P, kVecs>([&](int m, int64_t k) { return from[k * value_pitch_ + m]; },
                                weights_, words, c, !fresh);
        }
    }

    // Whether any of the flat rows [i, i + rows) sees one of `count` keys from `start` on.
    bool sees(int64_t i, int64_t rows, int64_t start, int64_t count) const {
        return limits_[i + rows - 1] > start && lows_[i] < start + count;
    }

    // Takes out the scores of keys that flat rows [i, i + lanes) do not see.
    void hide(int64_t i, int64_t lanes, int64_t start, int64_t count) {
        const int64_t even = div_ceil(count, kPerWord) * kPerWord;
        if (limits_[i] - start >= even && lows_[i + lanes - 1] <= start) return;
        for (int64_t lane = 0; lane < lanes; lane += kLanes) {
            const VecI limit = load_raw<VecI>(limits_ + i + lane) - static_cast<int32_t>(start);
            const VecI low = load_raw<VecI>(lows_ + i + lane) - static_cast<int32_t>(start);
            for (int64_t n = 0; n < even; ++n) {
                float* const at = scores_ + n * kPitch + lane;
                const VecI key = VecI{} + static_cast<int32_t>(n);
                store(at, (key >= limit) | (key < low) ? splat(-kInfinity) : load(at));
            }
        }
    }

    // Scores -> weights. `shrink` is what the results so far must be multiplied with; false if that
    // is 1 everywhere.
    template <int kVecs>
    bool soften(int64_t count, bool fresh, float* state, Vec (&shrink)[kVecs]) {
        const float factor = p_.scale * kLog2E;
        const int64_t even = div_ceil(count, kPerWord) * kPerWord;
        Vec tops[kVecs], shifts[kVecs], sums[kVecs];
        for (int v = 0; v < kVecs; ++v) {
            tops[v] = fresh ? splat(-kInfinity) : load(state + v * kLanes);
        }
        for (int64_t n = 0; n < even; ++n) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                tops[v] = max_of(tops[v], load(scores_ + n * kPitch + v * kLanes) * factor);
            }
        }
        bool moved = false;
        for (int v = 0; v < kVecs; ++v) {
            float* const top = state + v * kLanes;
            shifts[v] = shift_of(tops[v]);
            shrink[v] = fresh ? Vec{} : share(load(top), tops[v]);
            sums[v] = fresh ? Vec{} : load(top + kPitch) * shrink[v];
            store(top, tops[v]);
            moved |= any(shrink[v] != 1.0f);
        }
        for (int64_t n = 0; n < even; n += kPerWord) {
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                const float* const at = scores_ + n * kPitch + v * kLanes;
                const Vec first = exp2(load(at) * factor - shifts[v]);
                const Vec second = exp2(load(at + (kPerWord - 1) * kPitch) * factor - shifts[v]);
                const VecU word = weight_words<P>(first, second);
                __builtin_memcpy(weights_ + n / kPerWord * kPitch + v * kLanes, &word,
                                 sizeof(word));
                sums[v] = P::mac(sums[v], word, one_words<P>());
            }
        }
        for (int v = 0; v < kVecs; ++v) store(state + kPitch + v * kLanes, sums[v]);
        return moved;
    }

    static bool any(VecI mask) {
        int32_t found = 0;
        for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
        return found != 0;
    }

    void merge_lanes(float* total, const float* next) const {
        const int64_t at = value_rows_ * kPitch;
        const Vec old_top = load(total + at), new_top = load(next + at);
        const Vec top = max_of(old_top, new_top);
        const Vec keep = share(old_top, top), add = share(new_top, top);
        for (int64_t n = 0; n < value_rows_; ++n) {
            float* const out = total + n * kPitch;
            store(out, merged(load(out), keep, load(next + n * kPitch), add));
        }
        store(total + at, top);
        float* const sum = total + at + kPitch;
        store(sum, merged(load(sum), keep, load(next + at + kPitch), add));
    }

    const AttentionParams& p_;
    const AttentionShape& s_;
    const int64_t key_words_, value_rows_, value_pitch_, panels_;
    const bool latent_;  // values are the keys' first features
    const int64_t row_words_;
    Item item_{};
    uint32_t* queries_;       // [panels][key_words][kPitch]
    uint32_t* copied_;        // [kBlock][row_words]: keys that cannot be used as they stand
    uint32_t* values_words_;  // [kBlock / kPerWord][value_pitch]
    float* scores_;           // [kBlock][kPitch]
    uint32_t* weights_;       // [kBlock / kPerWord][kPitch]
    int32_t* limits_;         // of each flat row: the key after the last one that it sees
    int32_t* lows_;           // and the first
    Element* value_pair_;     // two rows of values that were int8
    const KV* const* next_keys_ = nullptr;  // of the block after the one in work
    const KV* const* next_values_ = nullptr;
    int64_t num_next_ = 0;
    const KV* keys_[kSpan + kBlock];
    const KV* values_[kSpan + kBlock];
};

}  // namespace tokenspeed::cpu::TS_ISA
