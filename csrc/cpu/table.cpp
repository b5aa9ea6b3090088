// SPDX-License-Identifier: MIT
// The table of the kernels of one build.
#include "kernels.h"

#define TS_TEXT(name) #name
#define TS_NAME(isa) TS_TEXT(isa)

namespace tokenspeed::cpu::TS_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {TS_NAME(TS_ISA), norm, rope,   append, attention, silu_mul,
                          route,           moe,  linear, sample, penalize};

}  // namespace tokenspeed::cpu::TS_ISA
