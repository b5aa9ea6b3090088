// SPDX-License-Identifier: MIT
// Only the scheduler, when a step commits, can say that positions are written.
// expect: private
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
int32_t written() { return Committed(4).computed(); }
#else
int32_t written(const Committed& proof) { return proof.computed(); }
#endif
}  // namespace tokenspeed
