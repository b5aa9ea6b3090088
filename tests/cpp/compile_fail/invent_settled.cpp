// SPDX-License-Identifier: MIT
// Only the commit of a step says which positions are settled.
// expect: private
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
Settled settled() { return Settled(4); }
#else
Settled settled(const Committed& proof) { return proof.settled(0); }
#endif
}  // namespace tokenspeed
