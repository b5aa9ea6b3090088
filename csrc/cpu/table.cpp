// SPDX-License-Identifier: MIT
// The table of the kernels of one build.
#include "kernels.h"

#define TS_TEXT(name) #name
#define TS_NAME(isa) TS_TEXT(isa)

namespace tokenspeed::cpu::TS_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .isa = TS_NAME(TS_ISA),
    .norm = norm,
    .rope = rope,
    .append = append,
    .attention = attention,
    .merge_state = merge_state,
    .gather_latent = gather_latent,
    .silu_mul = silu_mul,
    .embedding = embedding,
    .add = add,
    .route = route,
    .moe = moe,
    .linear = linear,
    .pack = pack,
    .quantize = quantize,
    .linear_packed = linear_packed,
    .sample = sample,
    .penalize = penalize,
};

}  // namespace tokenspeed::cpu::TS_ISA
