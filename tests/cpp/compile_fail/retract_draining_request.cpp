// SPDX-License-Identifier: MIT
// A step in flight still reads the pages of a draining request: nothing takes them back early.
// expect: no matching function|could not convert
#include "scheduler/states.h"

namespace tokenspeed {
#ifdef MUST_FAIL
Retracted retract(Draining state) { return on(std::move(state), Retract{}); }
#else
Retracted retract(Decoding state) { return on(std::move(state), Retract{}); }
#endif
}  // namespace tokenspeed
