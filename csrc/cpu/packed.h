// SPDX-License-Identifier: MIT
// Weights in the layout that streams, and products of rows with them. Knows no op.
//
// A weight [out, in] is cut into panels of kPanelOut outputs; a panel's memory is read once, in
// order, whatever the number of rows that are multiplied with it:
//
//   float32    in rows of     | n0 | n1 | ... | n63 |                     one k, 4 bytes each
//   bfloat16   in/2 rows of   | n0 k0 k1 | n1 k0 k1 | ...                 two k, 2 bytes each
//   int8       in/group times | group/4 rows of | n0 k0..k3 | n1 ... |    code + 128
//                             | 64 bfloat16 scales |
//   int4       in/group times | group/8 rows of | n0 k0..k7 | n1 ... |    code + 8; the low halves
//                             | 64 bfloat16 scales |                      of 4 bytes are k0..k3
//
// The layout is the same for every instruction set. Outputs past the last are zero, and so is the
// k past an odd `in`. Sums run over k in one order, whatever the rows beside: a row of the result
// depends on no batch. Integer codes meet activations that are quantised to int8 for each group.
#pragma once

#include "gemm.h"

namespace tokenspeed::cpu::TS_ISA {

inline constexpr int64_t kBlockBytes = 32768;  // of a panel, kept in the first cache
inline constexpr int64_t kSmallBlockBytes = 8192;
inline constexpr int64_t kSmallBlockRows = 24;
inline constexpr int64_t kAheadBytes = 4096;
inline constexpr int64_t kLine = 64;
inline constexpr int64_t kRowLines = kPanelOut * 4 / kLine;  // of a panel's row of words
inline constexpr int64_t kScaleBytes = kPanelOut * 2;
static_assert(kPanelOut % (kPanelVecs * kLanes) == 0);

// ---- Memory ------------------------------------------------------------------------------------

// Of a panel, between two turns of the tiles. Memory is waited for with up to kSmallBlockRows rows:
// a small block stays beside the next one, which comes in meanwhile. More rows are computed longer
// than that takes (those of int4 twice as long for a byte), and turns cost loads and stores of
// sums; a single tile needs no turns.
inline int64_t block_bytes(int64_t rows, int64_t tiles) {
    return tiles > 1 && rows <= kSmallBlockRows ? kSmallBlockBytes : kBlockBytes;
}

// What the `index`-th of `count` passes over a block of a panel asks for: a single one what comes
// soon, several their shares of the next block, so that memory works while they multiply.
struct Fetch {
    const char* from;
    int lines;  // for each row of the block: 0, 1, 2 or kRowLines

    Fetch(const char* block, int64_t block_bytes, int64_t index, int64_t count) {
        lines = count == 1 ? kRowLines : count <= 3 ? 2 : 1;
        const int64_t share = block_bytes * lines / kRowLines;
        from = count == 1 ? block + kAheadBytes : block + block_bytes + index * share;
        if (index * lines >= kRowLines) lines = 0;
    }

    template <typename Body>
    void with_lines(const Body& body) const {
        if (lines == 0) return body(std::integral_constant<int, 0>{});
        if (lines == 1) return body(std::integral_constant<int, 1>{});
        if (lines == 2) return body(std::integral_constant<int, 2>{});
        body(std::integral_constant<int, kRowLines>{});
    }
};

template <int kLines>
inline void fetch_lines(const char* from) {
#pragma GCC unroll 4
    for (int i = 0; i < kLines; ++i) __builtin_prefetch(from + i * kLine, 0, 2);
}

// ---- Plain elements ----------------------------------------------------------------------------

// One k (Floats) or two (Pairs) of the panel row `row`, times those of A. `kPair`: the panel holds
// pairs of bfloat16.
template <bool kPair, typename A, int kRows, int kVecs>
inline void plain_step(const A* a, int64_t a_stride, const uint32_t* row,
                       Vec (&sums)[kRows][kVecs]) {
    VecU b[kVecs];
#pragma GCC unroll 4
    for (int v = 0; v < kVecs; ++v) b[v] = load_raw<VecU>(row + v * kLanes);
    if constexpr (kPair && kHasPairs && sizeof(A) == 2) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const VecU word = splat(load_raw<uint32_t>(a + m * a_stride));
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v)
                sums[m][v] = Product<bf16, bf16>::mac(sums[m][v], word, b[v]);
        }
    } else if constexpr (kPair) {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const float even = load_one(a + m * a_stride), odd = load_one(a + m * a_stride + 1);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                sums[m][v] += bit_cast<Vec>(b[v] << 16) * even;
                sums[m][v] += bit_cast<Vec>(b[v] & 0xFFFF0000u) * odd;
            }
        }
    } else {
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const float word = load_one(a + m * a_stride);
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) sums[m][v] += bit_cast<Vec>(b[v]) * word;
        }
    }
}

// Loads or zeroes the sums of a tile, and stores them; c has rows of kPanelOut floats.
template <int kRows, int kVecs>
inline void open_sums(Vec (&sums)[kRows][kVecs], const float* c, bool accumulate) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) {
            sums[m][v] = accumulate ? load(c + m * kPanelOut + v * kLanes) : Vec{};
        }
    }
}
template <int kRows, int kVecs>
inline void close_sums(const Vec (&sums)[kRows][kVecs], float* c) {
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) store(c + m * kPanelOut + v * kLanes, sums[m][v]);
    }
}

// c[m][0 : kVecs * kLanes] (+)= A[m][...] * `depth` rows of a panel. Meanwhile kLines cache lines a
// row are asked for at `fetch`.
template <bool kPair, int kLines, typename A, int kRows, int kVecs>
inline void plain_tile(const A* a, int64_t a_stride, const uint32_t* panel, int64_t depth, float* c,
                       bool accumulate, const char* fetch) {
    Vec sums[kRows][kVecs];
    open_sums(sums, c, accumulate);
    for (int64_t k = 0; k < depth; ++k) {
        fetch_lines<kLines>(fetch + k * kLines * kLine);
        plain_step<kPair>(a + k * (kPair ? 2 : 1), a_stride, panel + k * kPanelOut, sums);
    }
    close_sums(sums, c);
}

// ---- Integer codes -----------------------------------------------------------------------------

// Activations as int8: x = code * scale, for each row and group.
struct Codes {
    const int8_t* codes;  // [rows, in]
    const float* scales;  // [rows, groups]
    const int32_t* sums;  // [rows, groups] of the codes
    int64_t in, groups;   // in: a multiple of 4

    // Of the rows from `row` on.
    Codes from(int64_t row) const {
        return {codes + row * in, scales + row * groups, sums + row * groups, in, groups};
    }
};

// sum[lane] + the dot product of four unsigned and four signed bytes.
inline VecI dot4(VecI sum, VecU u8, VecU s8) {
#ifdef TS_ISA_avx512bf16
    return bit_cast<VecI>(
        _mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(u8), bit_cast<__m512i>(s8)));
#elif defined(TS_ISA_avx512)
    const __m512i u = bit_cast<__m512i>(u8), s = bit_cast<__m512i>(s8);
    const __m512i even = _mm512_madd_epi16(_mm512_and_si512(u, _mm512_set1_epi16(255)),
                                           _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
    const __m512i odd = _mm512_madd_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
    return sum + bit_cast<VecI>(_mm512_add_epi32(even, odd));
#elif defined(TS_ISA_avx2)
    const __m256i u = bit_cast<__m256i>(u8), s = bit_cast<__m256i>(s8);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(s, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u, 8), _mm256_srai_epi16(s, 8));
    return sum + bit_cast<VecI>(_mm256_add_epi32(even, odd));
#else
    const VecI signed_bytes = bit_cast<VecI>(s8);
    sum += bit_cast<VecI>(u8 & 255u) * ((signed_bytes << 24) >> 24);
    sum += bit_cast<VecI>((u8 >> 8) & 255u) * ((signed_bytes << 16) >> 24);
    sum += bit_cast<VecI>((u8 >> 16) & 255u) * ((signed_bytes << 8) >> 24);
    return sum + bit_cast<VecI>(u8 >> 24) * (signed_bytes >> 24);
#endif
}

// Panel rows [0, count) of one group into integer sums.
template <int kBits, int kLines, int kRows, int kVecs>
inline void group_sums(const uint32_t* a, int64_t a_stride, const uint32_t* rows, int64_t count,
                       VecI (&sums)[kRows][kVecs], const char* fetch) {
    for (int64_t w = 0; w < count; ++w) {
        fetch_lines<kLines>(fetch + w * kLines * kLine);
        VecU b[kVecs];
#pragma GCC unroll 4
        for (int v = 0; v < kVecs; ++v) b[v] = load_raw<VecU>(rows + w * kPanelOut + v * kLanes);
        if constexpr (kBits == 8) {
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                const VecU word = splat(a[m * a_stride + w]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) sums[m][v] = dot4(sums[m][v], b[v], word);
            }
        } else {
            VecU high[kVecs];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                high[v] = (b[v] >> 4) & 0x0F0F0F0Fu;
                b[v] &= 0x0F0F0F0Fu;
            }
#pragma GCC unroll 8
            for (int m = 0; m < kRows; ++m) {
                const VecU first = splat(a[m * a_stride + 2 * w]);
                const VecU second = splat(a[m * a_stride + 2 * w + 1]);
#pragma GCC unroll 4
                for (int v = 0; v < kVecs; ++v) {
                    sums[m][v] = dot4(dot4(sums[m][v], b[v], first), high[v], second);
                }
            }
        }
    }
}

// c[m][0 : kVecs * kLanes] (+)= rows [row, row + kRows) of A * columns n and up of a panel's groups
// [begin, end), the first of which stands at `panel`. Meanwhile kLines cache lines for each of the
// panel's rows are asked for at `fetch`.
template <int kBits, int kLines, int kRows, int kVecs>
inline void code_tile(const Codes& a, int64_t row, int64_t group, int64_t begin, int64_t end,
                      const char* panel, int64_t n, float* c, bool accumulate, const char* fetch) {
    constexpr int32_t kZero = kBits == 8 ? 128 : 8;
    constexpr int kScaleLines = kLines > 1 ? kLines / 2 : 0;
    const int64_t count = group * kBits / 32, a_stride = a.in / 4;
    Vec sums[kRows][kVecs];
    open_sums(sums, c, accumulate);
    for (int64_t g = begin; g < end; ++g) {
        VecI whole[kRows][kVecs];
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const int32_t start = -kZero * a.sums[(row + m) * a.groups + g];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) whole[m][v] = VecI{} + start;
        }
        const uint32_t* const words =
            reinterpret_cast<const uint32_t*>(a.codes + row * a.in + g * group);
        group_sums<kBits, kLines>(words, a_stride, reinterpret_cast<const uint32_t*>(panel) + n,
                                  count, whole, fetch);
        fetch_lines<kScaleLines>(fetch + count * kLines * kLine);
        fetch += count * kLines * kLine + kScaleLines * kLine;
        const bf16* const scales = reinterpret_cast<const bf16*>(panel + count * kPanelOut * 4) + n;
#pragma GCC unroll 8
        for (int m = 0; m < kRows; ++m) {
            const float scale = a.scales[(row + m) * a.groups + g];
#pragma GCC unroll 4
            for (int v = 0; v < kVecs; ++v) {
                const Vec both = load(scales + v * kLanes) * scale;
                sums[m][v] += __builtin_convertvector(whole[m][v], Vec) * both;
            }
        }
        panel += count * kPanelOut * 4 + kScaleBytes;
    }
    close_sums(sums, c);
}

// ---- A panel -----------------------------------------------------------------------------------

// Tiles that `rows` rows are cut into: of nearly equal size, at most kMost each, and two if one
// would be so large that it computes longer than memory takes.
template <int kMost>
inline int64_t num_tiles(int64_t rows) {
    return rows > 4 && rows <= kMost ? 2 : div_ceil(rows, kMost);
}

// Calls tile(integral_constant<kCount>, first) for each.
template <int kMost, typename Tile>
inline void row_tiles(int64_t rows, const Tile& tile) {
    const int64_t pieces = num_tiles<kMost>(rows);
    int64_t first = 0;
    for (int64_t i = 0; i < pieces; ++i) {
        const int64_t count = (rows - first) / (pieces - i) + ((rows - first) % (pieces - i) != 0);
        switch (count) {
            case 1:
                tile(std::integral_constant<int, 1>{}, first);
                break;
            case 2:
                tile(std::integral_constant<int, 2>{}, first);
                break;
            case 3:
                tile(std::integral_constant<int, 3>{}, first);
                break;
            case 4:
                tile(std::integral_constant<int, 4>{}, first);
                break;
            case 5:
                tile(std::integral_constant<int, 5>{}, first);
                break;
            default:
                tile(std::integral_constant<int, 6>{}, first);
        }
        first += count;
    }
}

// c[rows][kPanelOut] = A * panel, for plain elements. A block of the panel serves all rows before
// the next is touched.
template <bool kPair, typename A>
inline void plain_panel(int64_t rows, const A* a, int64_t a_stride, const char* panel, int64_t in,
                        float* c) {
    constexpr int kPer = kPair ? 2 : 1;
    const int64_t depth = kPair ? div_ceil(in, 2) : in, tiles = num_tiles<kTileRows>(rows);
    const int64_t step = block_bytes(rows, tiles) / (kPanelOut * 4);
    const uint32_t* const words = reinterpret_cast<const uint32_t*>(panel);
    for (int64_t k = 0; k < depth; k += step) {
        const int64_t count = min_of(step, depth - k);
        int64_t index = 0;
        row_tiles<kTileRows>(rows, [&](auto size, int64_t first) {
            const Fetch fetch(panel + k * kPanelOut * 4, count * kPanelOut * 4, index++, tiles);
            for (int64_t n = 0; n < kPanelOut; n += kPanelVecs * kLanes) {
                const auto tile = [&](auto lines) {
                    plain_tile<kPair, lines(), A, size(), kPanelVecs>(
                        a + first * a_stride + k * kPer, a_stride, words + k * kPanelOut + n, count,
                        c + first * kPanelOut + n, k != 0, fetch.from);
                };
                if (n == 0) {
                    fetch.with_lines(tile);
                } else {
                    tile(std::integral_constant<int, 0>{});
                }
            }
        });
    }
}

// The same for codes. Few rows take all columns at once, more of them go over half a block's
// columns, then over the others.
template <int kBits>
inline void code_panel(int64_t rows, const Codes& a, const char* panel, int64_t group, float* c) {
    constexpr int kMany = kPanelVecs == 4 ? 6 : 2, kFew = kPanelVecs == 4 ? 3 : 1;
    const int64_t group_bytes = group * kBits / 32 * kPanelOut * 4 + kScaleBytes;
    const bool few = rows <= kFew;
    const int64_t step =
        max_of<int64_t>(1, block_bytes(kBits == 4 ? 2 * rows : rows, few ? 1 : 2) / group_bytes);
    for (int64_t g = 0; g < a.groups; g += step) {
        const int64_t end = min_of(g + step, a.groups);
        const char* const block = panel + g * group_bytes;
        const auto pass = [&]<int kRows, int kVecs>(std::integral_constant<int, kRows>,
                                                    std::integral_constant<int, kVecs>,
                                                    int64_t first, int64_t index, int64_t count) {
            constexpr int64_t kPasses = kPanelOut / (kVecs * kLanes);
            for (int64_t i = 0; i < kPasses; ++i) {
                const int64_t n = i * kVecs * kLanes;
                const Fetch fetch(block, (end - g) * group_bytes, index * kPasses + i,
                                  count * kPasses);
                fetch.with_lines([&](auto lines) {
                    code_tile<kBits, lines(), kRows, kVecs>(a, first, group, g, end, block, n,
                                                            c + first * kPanelOut + n, g != 0,
                                                            fetch.from);
                });
            }
        };
        int64_t index = 0;
        if (few) {
            row_tiles<kFew>(rows, [&](auto size, int64_t first) {
                if constexpr (size() <= kFew) {
                    pass(size, std::integral_constant<int, kPanelVecs>{}, first, index++, 1);
                }
            });
        } else {
            const int64_t count = num_tiles<kMany>(rows);
            row_tiles<kMany>(rows, [&](auto size, int64_t first) {
                if constexpr (size() <= kMany) {
                    pass(size, std::integral_constant<int, 2>{}, first, index++, count);
                }
            });
        }
    }
}

// ---- Any format --------------------------------------------------------------------------------

// Rows to be multiplied with a packed weight: as they are, and as codes if the weight has codes.
template <typename A>
struct Rows {
    const A* x;
    int64_t stride;
    Codes codes;
};

// c[rows][kPanelOut] = rows [first, first + rows) of `a` times panel `panel` of weight `which`.
template <typename A>
inline void panel_of(int64_t first, int64_t rows, const Rows<A>& a, const PackedWeight& weight,
                     int64_t which, int64_t panel, float* c) {
    const char* const data =
        weight.data + which * weight.bytes_each() + panel * weight.panel_bytes();
    if (weight.format == Format::kPlain) {
        const A* const x = a.x + first * a.stride;
        if (weight.dtype == DType::kBFloat16) {
            return plain_panel<true>(rows, x, a.stride, data, weight.in, c);
        }
        return plain_panel<false>(rows, x, a.stride, data, weight.in, c);
    }
    const Codes codes = a.codes.from(first);
    if (weight.format == Format::kInt8) {
        code_panel<8>(rows, codes, data, weight.group, c);
    } else {
        code_panel<4>(rows, codes, data, weight.group, c);
    }
}

// Quantises a row of activations: for each group, scale = max |x| / 127. A group with NaN or
// infinity gets the scale NaN.
template <typename A>
inline void encode_row(const A* x, int64_t in, int64_t group, int8_t* codes, float* scales,
                       int32_t* sums) {
    for (int64_t g = 0; g < in / group; ++g) {
        const float most = largest_magnitude(x + g * group, group);
        scales[g] = most / 127.0f;
        const float factor = most > 0.0f ? 127.0f / most : 0.0f;
        VecI sum{};
        for (int64_t k = 0; k < group; k += kLanes) {
            const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
            const Vec rounded = load(x + g * group + k) * factor + magic;
            const VecI code = bit_cast<VecI>(rounded) - bit_cast<int32_t>(magic);
            sum += code;
            using Bytes = int8_t __attribute__((vector_size(kLanes)));
            const Bytes bytes = __builtin_convertvector(code, Bytes);
            __builtin_memcpy(codes + g * group + k, &bytes, sizeof(bytes));
        }
        int32_t total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
        sums[g] = total;
    }
}

// Room that the codes of `rows` rows take, and where they stand in it.
inline int64_t codes_bytes(int64_t rows, const PackedWeight& w) {
    return w.format == Format::kPlain ? 0 : rows * (w.in + w.in / w.group * 8) + 64;
}
struct CodesRoom {
    int8_t* codes;
    float* scales;
    int32_t* sums;

    CodesRoom(char* memory, int64_t rows, const PackedWeight& w)
        : codes(reinterpret_cast<int8_t*>(memory)),
          scales(reinterpret_cast<float*>(memory + div_ceil(rows * w.in, 4) * 4)),
          sums(reinterpret_cast<int32_t*>(scales + rows * (w.in / w.group))) {}

    template <typename A>
    void encode(int64_t row, const A* x, const PackedWeight& w) const {
        const int64_t groups = w.in / w.group;
        encode_row(x, w.in, w.group, codes + row * w.in, scales + row * groups,
                   sums + row * groups);
    }
    Codes view(const PackedWeight& w) const { return {codes, scales, sums, w.in, w.in / w.group}; }
};

}  // namespace tokenspeed::cpu::TS_ISA
