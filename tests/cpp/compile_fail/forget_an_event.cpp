// SPDX-License-Identifier: MIT
// An event without a verdict for every state stops the build.
// expect: static assertion failed|static_assert failed
#include "scheduler/states.h"

namespace tokenspeed {
#ifdef MUST_FAIL
struct Surprise {};
static_assert(total_over(Types<Surprise>{}), "each pair has a verdict");
#else
struct Surprise {};
static_assert(!total_over(Types<Surprise>{}), "each pair has a verdict");
#endif
}  // namespace tokenspeed
