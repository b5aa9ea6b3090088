// SPDX-License-Identifier: MIT
// The size of a step, and what of a kernel's parameters follows from it: which of a replay's
// numbers may differ from those of the call that was recorded. Knows no recording and no memory.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tokenspeed::cpu {

struct StepSize {
    int64_t num_tokens = 0, num_rows = 0;

    bool operator==(const StepSize&) const = default;
};

// Parameters of a call in a step of size `from` -> of the same call in a step of size `to`. False,
// and nothing changes, if nobody can say: the call is of no token each, or its shape says
// otherwise.
template <typename Params>
bool resize(Params& p, const StepSize& from, const StepSize& to) {
    if constexpr (requires { p.num_tokens; }) {
        if (p.num_tokens != from.num_tokens) return false;
        p.num_tokens = to.num_tokens;
        return true;
    }
    return false;
}

// Keys in line have lengths of their own.
inline bool resize(AttentionParams& p, const StepSize& from, const StepSize& to) {
    if (p.k_start != nullptr || p.num_tokens != from.num_tokens || p.num_rows != from.num_rows) {
        return false;
    }
    p.num_tokens = to.num_tokens;
    p.num_rows = to.num_rows;
    return true;
}

}  // namespace tokenspeed::cpu
