// SPDX-License-Identifier: MIT
// Norms, rotary embedding, appends to the cache, the gated activation, rows by id and sums: ops
// that read their inputs once. Rows are independent, and each is computed by one thread.
#include <cstring>

#include "simd.h"

namespace tokenspeed::cpu::TS_ISA {
namespace {

// Rows a task takes, so that it moves some tens of kilobytes.
int64_t rows_per_task(int64_t row_elements) {
    return max_of<int64_t>(1, 16384 / max_of<int64_t>(1, row_elements));
}

template <typename T>
void norm_row(const NormParams& p, int64_t row) {
    const T* const x = static_cast<const T*>(p.x) + row / p.num_heads * p.x_stride +
                       row % p.num_heads * p.x_head_stride;
    const T* const weight = static_cast<const T*>(p.weight);
    T* const out = static_cast<T*>(p.out) + row * p.size;
    const T* source = x;
    if (p.residual != nullptr) {
        const T* const residual = static_cast<const T*>(p.residual) + row * p.residual_stride;
        T* const sum = static_cast<T*>(p.sum) + row * p.size;
        for (int64_t i = 0; i < p.size; i += kLanes) {
            store_at(sum, i, p.size, load_at(x, i, p.size) + load_at(residual, i, p.size));
        }
        source = sum;
    }
    Vec squares[2] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= p.size; i += 2 * kLanes) {
        const Vec a = load(source + i), b = load(source + i + kLanes);
        squares[0] += a * a;
        squares[1] += b * b;
    }
    for (; i < p.size; i += kLanes) {
        const Vec a = load_at(source, i, p.size);
        squares[0] += a * a;
    }
    const float mean = reduce_add(squares[0] + squares[1]) / static_cast<float>(p.size);
    const float scale = 1.0f / __builtin_sqrtf(mean + p.eps);
    for (i = 0; i < p.size; i += kLanes) {
        store_at(out, i, p.size, load_at(source, i, p.size) * scale * load_at(weight, i, p.size));
    }
}

}  // namespace

void norm(const NormParams& p) {
    with_type(p.dtype, [&](auto type) {
        const int64_t rows = p.num_tokens * p.num_heads;
        parallel_for(rows, rows_per_task(p.size), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) norm_row<decltype(type)>(p, row);
        });
    });
}

namespace {

template <typename T, typename To>
void rotate_halves(const T* x, const float* cos, const float* sin, int64_t half, To* out) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const Vec a = load_at(x, i, half), b = load_at(x + half, i, half);
        const Vec c = load_at(cos, i, half), s = load_at(sin, i, half);
        store_at(out, i, half, a * c - b * s);
        store_at(out + half, i, half, b * c + a * s);
    }
}

template <typename T, typename To>
void rotate_pairs(const T* x, const float* cos, const float* sin, int64_t half, To* out) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = load_one(x + 2 * i), b = load_one(x + 2 * i + 1);
        store_one(out + 2 * i, a * cos[i] - b * sin[i]);
        store_one(out + 2 * i + 1, b * cos[i] + a * sin[i]);
    }
}

template <typename T, typename To>
void copy(const T* x, int64_t size, To* out) {
    for (int64_t i = 0; i < size; i += kLanes) store_at(out, i, size, load_at(x, i, size));
}

template <typename T, typename To>
void rope_token(const RopeParams& p, int64_t token) {
    const float* const cos = p.cos_sin + p.positions[token] * p.rot;
    const int64_t half = p.rot / 2;
    const int64_t row = p.out_index != nullptr ? p.out_index[token] : token;
    for (int64_t head = 0; head < p.num_heads; ++head) {
        const T* const x = static_cast<const T*>(p.x) + token * p.x_stride + head * p.x_head_stride;
        To* const out = static_cast<To*>(p.out) + p.out_rows.at(row, head);
        if (p.interleaved) {
            rotate_pairs(x, cos, cos + half, half, out);
        } else {
            rotate_halves(x, cos, cos + half, half, out);
        }
        copy(x + p.rot, p.head_dim - p.rot, out + p.rot);
    }
}

}  // namespace

void rope(const RopeParams& p) {
    with_type(p.dtype, [&](auto from) {
        with_type(p.out_dtype, [&](auto to) {
            parallel_for(p.num_tokens, rows_per_task(p.num_heads * p.head_dim),
                         [&](int64_t begin, int64_t end) {
                             for (int64_t token = begin; token < end; ++token) {
                                 rope_token<decltype(from), decltype(to)>(p, token);
                             }
                         });
        });
    });
}

namespace {

// Features of a token and head as int8, and the scale after them: largest magnitude / 127, NaN if
// one is not finite.
template <typename T>
void quantize_row(const T* x, int64_t size, char* out) {
    const float scale = largest_magnitude(x, size) / 127.0f;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = 0; i < size; ++i) {
        const float code = __builtin_rintf(load_one(x + i) * inverse);
        out[i] = static_cast<char>(static_cast<int>(max_of(-127.0f, min_of(127.0f, code))));
    }
    __builtin_memcpy(out + size, &scale, sizeof(scale));
}

// Calls put(from, to) for each head of each token; To is char for int8 rows.
template <typename T, typename To, typename Put>
void append_heads(const AppendParams& p, const Put& put) {
    parallel_for(p.num_tokens, rows_per_task(p.num_heads * p.size),
                 [&](int64_t begin, int64_t end) {
                     for (int64_t token = begin; token < end; ++token) {
                         const T* const x = static_cast<const T*>(p.x) + token * p.x_stride;
                         for (int64_t head = 0; head < p.num_heads; ++head) {
                             put(x + head * p.size,
                                 static_cast<To*>(p.out) + p.out_rows.at(p.out_index[token], head));
                         }
                     }
                 });
}

}  // namespace

void append(const AppendParams& p) {
    with_type(p.dtype, [&](auto from) {
        using T = decltype(from);
        if (p.out_dtype == DType::kInt8Row) {
            return append_heads<T, char>(
                p, [&](const T* x, char* out) { quantize_row(x, p.size, out); });
        }
        with_type(p.out_dtype, [&](auto to) {
            using To = decltype(to);
            append_heads<T, To>(p, [&](const T* x, To* out) { copy(x, p.size, out); });
        });
    });
}

namespace {

template <typename T>
void silu_mul_row(const SiluMulParams& p, int64_t row) {
    const T* const gate = static_cast<const T*>(p.x) + row * p.x_stride;
    const T* const up = gate + p.size;
    T* const out = static_cast<T*>(p.out) + row * p.size;
    for (int64_t i = 0; i < p.size; i += kLanes) {
        store_at(out, i, p.size, silu(load_at(gate, i, p.size)) * load_at(up, i, p.size));
    }
}

}  // namespace

void silu_mul(const SiluMulParams& p) {
    with_type(p.dtype, [&](auto type) {
        parallel_for(p.num_tokens, rows_per_task(p.size), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) silu_mul_row<decltype(type)>(p, row);
        });
    });
}

void embedding(const EmbeddingParams& p) {
    parallel_for(p.num_tokens, rows_per_task(p.row_bytes / 2), [&](int64_t begin, int64_t end) {
        for (int64_t token = begin; token < end; ++token) {
            const int64_t row = p.ids[token] - p.first;
            char* const out = static_cast<char*>(p.out) + token * p.row_bytes;
            if (row >= 0 && row < p.num_rows) {
                const char* const weight = static_cast<const char*>(p.weight);
                std::memcpy(out, weight + row * p.row_bytes, p.row_bytes);
            } else {
                std::memset(out, 0, p.row_bytes);
            }
        }
    });
}

void add(const AddParams& p) {
    with_type(p.dtype, [&](auto type) {
        using T = decltype(type);
        parallel_for(p.num_tokens, rows_per_task(p.size), [&](int64_t begin, int64_t end) {
            for (int64_t row = begin; row < end; ++row) {
                const T* const x = static_cast<const T*>(p.x) + row * p.x_stride;
                const T* const y = static_cast<const T*>(p.y) + row * p.y_stride;
                T* const out = static_cast<T*>(p.out) + row * p.size;
                for (int64_t i = 0; i < p.size; i += kLanes) {
                    store_at(out, i, p.size, load_at(x, i, p.size) + load_at(y, i, p.size));
                }
            }
        });
    });
}

}  // namespace tokenspeed::cpu::TS_ISA
