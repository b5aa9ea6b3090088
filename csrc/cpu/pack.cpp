// SPDX-License-Identifier: MIT
// Weights into panels (packed.h says how they lie), and weights into codes.
#include "packed.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

template <typename T>
void pack_plain(const T* rows, int64_t count, int64_t in, char* panel) {
    constexpr int kPer = 4 / sizeof(T);
    const int64_t depth = div_ceil(in, kPer);
    for (int64_t lane = 0; lane < kPanelOut; lane += kLanes) {
        const int64_t lanes = min_of<int64_t>(kLanes, max_of<int64_t>(0, count - lane));
        for (int64_t d = 0; d < depth; d += kLanes) {
            VecU words[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                words[i] = VecU{};
                const int64_t left = in - d * kPer;
                if (i >= lanes) continue;
                const size_t bytes = min_of<int64_t>(left, kLanes * kPer) * sizeof(T);
                __builtin_memcpy(&words[i], rows + (lane + i) * in + d * kPer, bytes);
            }
            transpose(words);
            for (int i = 0; i < min_of<int64_t>(kLanes, depth - d); ++i) {
                __builtin_memcpy(panel + ((d + i) * kPanelOut + lane) * 4, &words[i], sizeof(VecU));
            }
        }
    }
}

void pack_scales(const bf16* scales, int64_t count, int64_t groups, int64_t g, char* to) {
    for (int64_t n = 0; n < kPanelOut; ++n) {
        const bf16 scale = n < count ? scales[n * groups + g] : bf16{0};
        __builtin_memcpy(to + n * 2, &scale, sizeof(scale));
    }
}

// int8: bytes as they are, offset by 128. int4: a word holds k0..k3 in its low halves, k4..k7 high.
template <int kBits>
void pack_codes(const uint8_t* rows, const bf16* scales, int64_t count, const PackedWeight& w,
                char* panel) {
    const int64_t row_bytes = w.in * kBits / 8, groups = w.in / w.group;
    for (int64_t g = 0; g < groups; ++g) {
        for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 32 / kBits) {
            for (int64_t n = 0; n < kPanelOut; ++n) {
                uint32_t word = 0;
                if (n < count) {
                    __builtin_memcpy(&word, rows + n * row_bytes + k * kBits / 8, 4);
                    if constexpr (kBits == 8) {
                        word ^= 0x80808080u;
                    } else {
                        const uint32_t even = word & 0x0F0F0F0Fu, odd = (word >> 4) & 0x0F0F0F0Fu;
                        // bytes of `even` are k0 k2 k4 k6, of `odd` k1 k3 k5 k7
                        const uint32_t first = (even & 255u) | (odd & 255u) << 8 |
                                               (even >> 8 & 255u) << 16 | (odd >> 8 & 255u) << 24;
                        const uint32_t second = (even >> 16 & 255u) | (odd >> 16 & 255u) << 8 |
                                                (even >> 24) << 16 | (odd >> 24) << 24;
                        word = first | second << 4;
                    }
                }
                __builtin_memcpy(panel + n * 4, &word, 4);
            }
            panel += kPanelOut * 4;
        }
        pack_scales(scales, count, groups, g, panel);
        panel += kScaleBytes;
    }
}

// The least bfloat16 that is not below x >= 0.
bf16 round_up(float x) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    return {static_cast<uint16_t>((bits + 0xFFFF) >> 16)};
}
bf16 nearest(float x) {
    bf16 rounded;
    store_one(&rounded, x);
    return rounded;
}

Vec round_even(Vec x) {
    const float magic = 12582912.0f;
    return (x + magic) - magic;
}

template <typename T>
void int8_group(const T* x, int64_t group, int8_t* codes, bf16* scale) {
    *scale = round_up(largest_magnitude(x, group) / 127.0f);
    const float step = load_one(scale), factor = step > 0.0f ? 1.0f / step : 0.0f;
    for (int64_t k = 0; k < group; k += kLanes) {
        const Vec code = round_even(load(x + k) * factor);
        using Bytes = int8_t __attribute__((vector_size(kLanes)));
        const Bytes bytes = __builtin_convertvector(__builtin_convertvector(code, VecI), Bytes);
        __builtin_memcpy(codes + k, &bytes, sizeof(bytes));
    }
}

// The code of x for a step: an integer in [-8, 7].
Vec int4_code(Vec x, float factor) {
    Vec code = round_even(x * factor);
    code = code < -8.0f ? splat(-8.0f) : code;
    return code > 7.0f ? splat(7.0f) : code;
}

// The step of least squared error among those that map the largest element to -8 ... or 8.
template <typename T>
void int4_group(const T* x, int64_t group, uint8_t* codes, bf16* scale) {
    Vec high{}, low{}, poison{};
    for (int64_t k = 0; k < group; k += kLanes) {
        const Vec v = load(x + k);
        high = max_of(high, v);
        low = max_of(low, -v);
        poison += v * 0.0f;
    }
    const float top = max_of(reduce_max(high), reduce_max(low));
    const float sign = reduce_max(high) > reduce_max(low) ? -1.0f : 1.0f;
    float best = kInfinity;
    *scale = nearest(reduce_add(poison));  // 0, or NaN
    for (int tried = 0; tried < 12 && top > 0.0f; ++tried) {
        const float levels = 6.5f + 0.25f * static_cast<float>(tried);
        const bf16 candidate = nearest(sign * top / levels);
        const float step = load_one(&candidate), factor = 1.0f / step;
        Vec error{};
        for (int64_t k = 0; k < group; k += kLanes) {
            const Vec v = load(x + k), miss = int4_code(v, factor) * step - v;
            error += miss * miss;
        }
        const float total = reduce_add(error);
        if (total < best) {
            best = total;
            *scale = candidate;
        }
    }
    const float step = load_one(scale), factor = step != 0.0f ? 1.0f / step : 0.0f;
    for (int64_t k = 0; k < group; k += kLanes) {
        float of[kLanes];
        store(of, int4_code(load(x + k), factor) + 8.0f);
        for (int lane = 0; lane < kLanes; lane += 2) {
            const uint8_t both = static_cast<uint8_t>(static_cast<int>(of[lane]) |
                                                      static_cast<int>(of[lane + 1]) << 4);
            codes[(k + lane) / 2] = both;
        }
    }
}

}  // namespace

void pack(const PackParams& p) {
    const PackedWeight& w = p.weight;
    const int64_t panels = w.num_panels();
    parallel_for(w.count * panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
            const int64_t first = task / panels * w.out + task % panels * kPanelOut;
            const int64_t count = min_of(kPanelOut, w.out - task % panels * kPanelOut);
            char* const panel = w.data + task * w.panel_bytes();
            const char* const elements = static_cast<const char*>(p.elements);
            const bf16* const scales = static_cast<const bf16*>(p.scales);
            const int64_t groups = w.format == Format::kPlain ? 0 : w.in / w.group;
            if (w.format == Format::kInt8) {
                pack_codes<8>(reinterpret_cast<const uint8_t*>(elements + first * w.in),
                              scales + first * groups, count, w, panel);
            } else if (w.format == Format::kInt4) {
                pack_codes<4>(reinterpret_cast<const uint8_t*>(elements + first * w.in / 2),
                              scales + first * groups, count, w, panel);
            } else {
                with_type(w.dtype, [&](auto type) {
                    using T = decltype(type);
                    pack_plain(reinterpret_cast<const T*>(elements) + first * w.in, count, w.in,
                               panel);
                });
            }
        }
    });
}

void quantize(const QuantizeParams& p) {
    const int64_t groups = p.in / p.group;
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(p.num_rows, 16, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin * groups; i < end * groups; ++i) {
                const T* const x = static_cast<const T*>(p.x) + i * p.group;
                bf16* const scale = static_cast<bf16*>(p.scales) + i;
                if (p.format == Format::kInt8) {
                    int8_group(x, p.group, static_cast<int8_t*>(p.codes) + i * p.group, scale);
                } else {
                    int4_group(x, p.group, static_cast<uint8_t*>(p.codes) + i * p.group / 2, scale);
                }
            }
        });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
