// SPDX-License-Identifier: MIT
// What bindings of the paged cache share.
#pragma once

#include "cpu_arguments.h"

namespace tokenspeed::cpu {

// Adds the functions of cpu_rope.cpp.
void bind_rope(nanobind::module_& m);

// A row of int8 features ends with their float32 scale (tokenspeed/kernels/kv_int8.py).
inline constexpr int64_t kScaleBytes = 4;

// The rows of a cache [pages, page_size, heads, features] or [pages, page_size, features].
inline CacheRows rows_of(const Tensor& cache) {
    return {cache.size(1), cache.stride(0), cache.stride(1),
            cache.ndim() == 4 ? cache.stride(2) : 0};
}

// Rows that lie one after the other, each of `num_heads` heads of `size` elements.
inline CacheRows dense_rows(int64_t num_heads, int64_t size) {
    return {1, num_heads * size, 0, size};
}

inline DType cache_type(const Tensor& cache, const char* name) {
    return cache.is(python::kUInt8) ? DType::kInt8Row : float_type(cache, name);
}

}  // namespace tokenspeed::cpu
