// SPDX-License-Identifier: MIT
// A lease is counted once.
// expect: deleted
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
Lease second(Lease& lease) { return lease; }
#else
Lease second(Lease& lease) { return std::move(lease); }
#endif
}  // namespace tokenspeed
