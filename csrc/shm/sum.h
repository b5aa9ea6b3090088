// SPDX-License-Identifier: MIT
// Sums of the ranks' pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::shm {

enum class DType : uint32_t { kFloat64, kFloat32, kBFloat16, kInt64, kInt32 };

size_t size_of(DType dtype);

// out[i] = sources[0][i] + sources[1][i] + ..., in this order, so that every rank computes the same
// bits; bfloat16 is summed in float32 and rounded once, to the nearest even.
// REQUIRES: num_sources >= 1; `out` is one of the sources or overlaps none.
void sum(DType dtype, const std::byte* const* sources, int num_sources, int64_t count,
         std::byte* out);

}  // namespace tokenspeed::shm
