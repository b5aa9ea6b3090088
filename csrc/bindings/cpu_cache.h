// SPDX-License-Identifier: MIT
// What bindings of the paged cache share.
#pragma once

#include "cpu_arguments.h"

namespace tokenspeed::cpu {

// Adds the functions of cpu_rope.cpp.
void bind_rope(nanobind::module_& m);

// A row of int8 features ends with their float32 scale (tokenspeed/kernels/kv_int8.py).
inline constexpr int64_t kScaleBytes = 4;

inline DType cache_type(const Tensor& cache, const char* name) {
    return cache.is(python::kUInt8) ? DType::kInt8Row : float_type(cache, name);
}

}  // namespace tokenspeed::cpu
