// SPDX-License-Identifier: MIT
// Routed experts: rows are sorted by expert, so that each routed expert's weights are read once for
// all of them and others not at all.
//
//   rows in sorted order -> [gate | up panels, silu * up] -> inner rows -> [down panels] -> sums
//
// A row's numbers depend on its token alone: each row of a product does (packed.h), and a token's
// experts are summed in the order of its choices.
#include "packed.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

constexpr int64_t kBlockRows = 192;    // rows of a task at most
constexpr int64_t kMostPairs = 16384;  // (token, choice) pairs in memory at once

// Rows of one expert: places [first, first + count) of the sorted order.
struct Block {
    int32_t expert, first, count;
};

// Which (token, choice) pairs each expert serves. A pair's place is its row in the sorted order;
// one that is computed elsewhere (its id is below 0) has none.
class Grouping {
  public:
    explicit Grouping(const MoeParams& p) {
        const int64_t pairs = p.num_tokens * p.top_k, experts = p.w13.count;
        const int64_t most = min_of(pairs, experts) + pairs / kBlockRows;
        int32_t* const begin = scratch_of<int32_t>(3, experts + 1 + pairs + most * 3);
        place_ = begin + experts + 1;
        blocks_ = reinterpret_cast<Block*>(place_ + pairs);
        for (int64_t e = 0; e <= experts; ++e) begin[e] = 0;
        for (int64_t i = 0; i < pairs; ++i) {
            if (p.ids[i] >= 0) ++begin[p.ids[i] + 1];
        }
        for (int64_t e = 0; e < experts; ++e) {
            add_blocks(e, begin[e], begin[e + 1]);
            begin[e + 1] += begin[e];
        }
        num_rows_ = begin[experts];
        for (int64_t i = 0; i < pairs; ++i) place_[i] = p.ids[i] < 0 ? -1 : begin[p.ids[i]]++;
    }

    int64_t num_rows() const { return num_rows_; }
    int64_t num_blocks() const { return num_blocks_; }
    const Block& block(int64_t i) const { return blocks_[i]; }
    int64_t place(int64_t pair) const { return place_[pair]; }  // -1: none

  private:
    // Blocks of nearly equal size.
    void add_blocks(int64_t expert, int32_t first, int32_t rows) {
        const int32_t pieces = static_cast<int32_t>(div_ceil(rows, kBlockRows));
        for (int32_t i = 0; i < pieces; ++i) {
            const int32_t from = rows * i / pieces, to = rows * (i + 1) / pieces;
            blocks_[num_blocks_++] = {static_cast<int32_t>(expert), first + from, to - from};
        }
    }

    int32_t* place_;
    Block* blocks_;
    int64_t num_rows_ = 0, num_blocks_ = 0;
};

template <typename T>
class Experts {
  public:
    explicit Experts(const MoeParams& p)
        : p_(p),
          groups_(p),
          size_(p.w13.in),
          inner_size_(p.w2.in),
          x_stride_(div_ceil(size_, 2) * 2),
          inner_stride_(div_ceil(inner_size_, 2) * 2) {
        const int64_t rows = groups_.num_rows();
        const bool plain = p.w13.format == Format::kPlain;
        const int64_t elements = rows * ((plain ? x_stride_ : 0) + inner_stride_);
        const int64_t codes = codes_bytes(rows, p.w13) + codes_bytes(rows, p.w2);
        char* memory =
            scratch_of<char>(2, rows * size_ * 4 + elements * int64_t{sizeof(T)} + codes + 256);
        const auto take = [&](int64_t bytes) {
            char* const taken = memory;
            memory += div_ceil(bytes, 64) * 64;
            return taken;
        };
        out_ = reinterpret_cast<float*>(take(rows * size_ * 4));
        inner_ = reinterpret_cast<T*>(take(rows * inner_stride_ * int64_t{sizeof(T)}));
        x_codes_ = take(codes_bytes(rows, p.w13));
        inner_codes_ = take(codes_bytes(rows, p.w2));
        x_ = reinterpret_cast<T*>(memory);
    }

    void run() {
        const int64_t wide = max_of<int64_t>(1, size_ * p_.top_k);
        const int64_t tokens = max_of<int64_t>(1, 32768 / wide);  // of a task that moves rows
        each(p_.num_tokens, tokens, [&](int64_t token) { sort(token); });
        const int64_t up_panels = div_ceil(inner_size_, kPanelOut), panels = p_.w2.num_panels();
        const Rows<T> x = rows_of(x_, x_stride_, x_codes_, p_.w13);
        each(groups_.num_blocks() * up_panels, 1,
             [&](int64_t i) { up(x, groups_.block(i / up_panels), i % up_panels * kPanelOut); });
        if (p_.w2.format != Format::kPlain) {
            const CodesRoom room(inner_codes_, groups_.num_rows(), p_.w2);
            each(groups_.num_rows(), max_of<int64_t>(1, 16384 / inner_size_),
                 [&](int64_t row) { room.encode(row, inner_ + row * inner_stride_, p_.w2); });
        }
        const Rows<T> inner = rows_of(inner_, inner_stride_, inner_codes_, p_.w2);
        each(groups_.num_blocks() * panels, 1,
             [&](int64_t i) { down(inner, groups_.block(i / panels), i % panels); });
        each(p_.num_tokens, tokens, [&](int64_t token) { combine(token); });
    }

  private:
    template <typename Body>
    static void each(int64_t count, int64_t chunk, const Body& body) {
        parallel_for(count, chunk, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) body(i);
        });
    }

    Rows<T> rows_of(const T* rows, int64_t stride, char* codes, const PackedWeight& w) const {
        if (w.format == Format::kPlain) return {rows, stride, {}};
        return {nullptr, 0, CodesRoom(codes, groups_.num_rows(), w).view(w)};
    }

    // A token's row to the places of its choices: as it is, or as codes, which are made once.
    void sort(int64_t token) {
        const T* const x = static_cast<const T*>(p_.x) + token * p_.x_stride;
        const CodesRoom room(x_codes_, groups_.num_rows(), p_.w13);
        int64_t encoded = -1;
        for (int64_t k = 0; k < p_.top_k; ++k) {
            const int64_t place = groups_.place(token * p_.top_k + k);
            if (place < 0) continue;
            if (p_.w13.format == Format::kPlain) {
                copy_row(x_ + place * x_stride_, x, size_, x_stride_);
            } else if (encoded < 0) {
                room.encode(place, x, p_.w13);
                encoded = place;
            } else {
                copy_codes(room, encoded, place);
            }
        }
    }

    void copy_codes(const CodesRoom& room, int64_t from, int64_t to) {
        const int64_t groups = size_ / p_.w13.group;
        __builtin_memcpy(room.codes + to * size_, room.codes + from * size_, size_);
        __builtin_memcpy(room.scales + to * groups, room.scales + from * groups, groups * 4);
        __builtin_memcpy(room.sums + to * groups, room.sums + from * groups, groups * 4);
    }

    // c[block.count][kPanelOut] = outputs [n, n + kPanelOut) of the expert, zeros past the last.
    // They stand in two panels where n is not a panel's first; `spare` is as large as c.
    void columns(const Rows<T>& rows, const Block& block, const PackedWeight& w, int64_t n,
                 float* c, float* spare) {
        const int64_t panel = n / kPanelOut, shift = n % kPanelOut;
        panel_of(block.first, block.count, rows, w, block.expert, panel, c);
        if (shift == 0) return;
        const bool more = panel + 1 < w.num_panels();
        if (more) panel_of(block.first, block.count, rows, w, block.expert, panel + 1, spare);
        for (int64_t m = 0; m < block.count; ++m) {
            float* const row = c + m * kPanelOut;
            const float* const next = spare + m * kPanelOut;
            for (int64_t i = 0; i < kPanelOut; ++i) {
                const int64_t at = i + shift;
                row[i] = at < kPanelOut ? row[at] : more ? next[at - kPanelOut] : 0.0f;
            }
        }
    }

    // Inner values [n, n + kPanelOut) of a block.
    void up(const Rows<T>& x, const Block& block, int64_t n) {
        const int64_t area = block.count * kPanelOut;
        float* const gate = scratch_of<float>(0, 3 * area);
        float* const up = gate + area;
        columns(x, block, p_.w13, n, gate, up + area);
        columns(x, block, p_.w13, inner_size_ + n, up, up + area);
        const int64_t count = min_of(kPanelOut, inner_size_ - n);
        for (int64_t m = 0; m < block.count; ++m) {
            T* const out = inner_ + (block.first + m) * inner_stride_ + n;
            for (int64_t i = 0; i < count; i += kLanes) {
                store_at(out, i, count,
                         silu(load(gate + m * kPanelOut + i)) * load(up + m * kPanelOut + i));
            }
            if (count % 2 != 0) store_one(out + count, 0.0f);
        }
    }

    void down(const Rows<T>& inner, const Block& block, int64_t panel) {
        float* const c = scratch_of<float>(0, block.count * kPanelOut);
        panel_of(block.first, block.count, inner, p_.w2, block.expert, panel, c);
        const int64_t n = panel * kPanelOut, count = min_of(kPanelOut, size_ - n);
        for (int64_t m = 0; m < block.count; ++m) {
            copy_row(out_ + (block.first + m) * size_ + n, c + m * kPanelOut, count, count);
        }
    }

    // Sums in the order of the token's choices; the addend comes last.
    void combine(int64_t token) {
        T* const out = static_cast<T*>(p_.out) + token * size_;
        const T* const addend = static_cast<const T*>(p_.addend) + token * p_.addend_stride;
        for (int64_t n = 0; n < size_; n += kLanes) {
            Vec sum{};
            for (int64_t k = 0; k < p_.top_k; ++k) {
                const int64_t pair = token * p_.top_k + k, place = groups_.place(pair);
                if (place < 0) continue;
                sum += load_at(out_ + place * size_, n, size_) * p_.weights[pair];
            }
            if (p_.addend != nullptr) sum += load_at(addend, n, size_);
            store_at(out, n, size_, sum);
        }
    }

    const MoeParams& p_;
    const Grouping groups_;
    const int64_t size_, inner_size_;        // of a token's row, of an inner row
    const int64_t x_stride_, inner_stride_;  // even, the gap is zero
    float* out_;                             // [rows, size_]
    T* inner_;                               // [rows, inner_stride_]
    T* x_;                                   // [rows, x_stride_], if w13 is plain
    char* x_codes_;                          // else CodesRoom
    char* inner_codes_;                      // likewise of w2
};

}  // namespace

void moe(const MoeParams& p) {
    const int64_t most = max_of<int64_t>(1, kMostPairs / max_of<int64_t>(1, p.top_k));
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        for (int64_t first = 0; first < p.num_tokens; first += most) {
            MoeParams part = p;
            part.num_tokens = min_of(most, p.num_tokens - first);
            part.x = static_cast<const T*>(p.x) + first * p.x_stride;
            if (p.addend != nullptr) {
                part.addend = static_cast<const T*>(p.addend) + first * p.addend_stride;
            }
            part.weights += first * p.top_k;
            part.ids += first * p.top_k;
            part.out = static_cast<T*>(p.out) + first * p.w13.in;
            Experts<T>(part).run();
        }
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
