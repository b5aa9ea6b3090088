// SPDX-License-Identifier: MIT
// Arguments of the merge of latent attention's partial results; the launcher packs the same bytes.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenspeed::cuda {

struct MlaCombineUpParams {
    const float* partial;    // [slots, block, 512], normalised
    const float* sums;       // [slots, block], logarithms to base 2
    const int32_t* q_start;  // [rows + 1]
    const int32_t* kv_len;   // [rows]
    const uint16_t* w_uv;    // [heads, 128, 512] bfloat16
    uint16_t* out;           // [tokens, heads, 128] bfloat16
    int32_t rows;
    int32_t ctas;  // of the kernel that wrote the partial results
    int32_t tokens;
    int32_t heads;
    int32_t block;  // query rows of a slot
};

static_assert(sizeof(MlaCombineUpParams) == 72 && offsetof(MlaCombineUpParams, rows) == 48);

}  // namespace tokenspeed::cuda
