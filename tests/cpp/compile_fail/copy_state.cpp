// SPDX-License-Identifier: MIT
// A state owns its slot and pages; two of them would own them twice.
// expect: deleted
#include "scheduler/states.h"

namespace tokenspeed {
#ifdef MUST_FAIL
State second(State& state) { return state; }
#else
State second(State& state) { return std::move(state); }
#endif
}  // namespace tokenspeed
