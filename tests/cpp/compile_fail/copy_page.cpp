// SPDX-License-Identifier: MIT
// One handle, one page: a copy would give it back twice.
// expect: deleted
#include "scheduler/pages.h"

namespace tokenspeed {
#ifdef MUST_FAIL
SealedPage second(SealedPage& page) { return page; }
#else
SealedPage second(SealedPage& page) { return std::move(page); }
#endif
}  // namespace tokenspeed
